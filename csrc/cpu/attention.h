// The C interface of the attention on the CPU. No torch.
//
//   s_ij = scale * <q_i, k_j> + bias[a(i), c(j)]      p = softmax over the keys of group(c(j))
//   o_i  = gain[a(i)] * sum_g gate_g(i) * sum_{c in g} weight[a(i), c] * sum_{j in c} phi(p_ij) v_j
#pragma once
#include <stddef.h>
#include <stdint.h>

#define FLASHBRUSH_ABI 2
#define FLASHBRUSH_EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {

enum { FB_F32 = 0, FB_BF16 = 1, FB_F16 = 2 };

// One (batch, tokens, heads, dim) tensor; strides in elements, the last dimension contiguous; stride 0
// broadcasts.
typedef struct {
  void* data;
  int64_t stride_b, stride_t, stride_h;
} FbTensor;

// A float32 table whose last dimensions are contiguous; stride 0 broadcasts an item or a head.
typedef struct {
  const float* data;  // null: absent
  int64_t stride_b, stride_h;
} FbTable;

typedef struct {
  int32_t abi, dtype;
  int64_t B, M, H, Hkv, D, R, C, G, L;  // L tensors of keys: 1, or C of them
  FbTensor q, out;
  const FbTensor *k, *v;                          // [L]
  const int64_t *source_q, *source_k, *source_v;  // [B], [L][B], [L][B]; null: the item itself
  const int32_t *row_lengths, *key_lengths;       // [R] or [B][R]; [C] or [B][C]
  const int32_t* valid;                           // [B][C], keys of a segment that exist; null: all
  int32_t rows_by_item, keys_by_item;
  const int32_t* groups;  // [C]
  const float* contrast;  // [G][4]: kind (0 none, 1 unclipped, 2 clipped), beta, lo, hi
  FbTable scale;          // [b][h]
  FbTable bias, weight;   // [b][h][R][C]
  FbTable gain;           // [b][h][R]
  FbTable gates;          // [b][row][G]; stride_h is the stride of a row
  float *lse, *mass;      // [B][H][M][G], [B][H][R][C]; null: not wanted
  // Gain derived from the mass of a block of segments, multiplied into the rows of others.
  int32_t derived;  // -1 none; 0 minmax, 1 mean, 2 max, 3 softmax over heads
  float span, floor;
  const uint8_t *gain_rows, *gain_keys,
      *gain_apply;  // [R], [C], [R]: the segments that count, and that are scaled
  float* gains;     // [B][H][R], the given gain times the derived one; null: not wanted and nothing derived
  int32_t threads;
} FbAttention;

// Runs worker(data) on `threads` threads and waits, as GOMP_parallel does.
typedef void (*FbParallel)(void (*worker)(void*), void* data, unsigned threads, unsigned flags);
}
