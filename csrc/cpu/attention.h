// The C interface of attention on the CPU. It has no torch types, so that one library serves every torch.
//
//   s_ij = scale * <q_i, k_j> + bias[a(i), c(j)]      p = softmax over the keys of group(c(j))
//   o_i  = gain[a(i)] * sum_g gate_g(i) * sum_{c in g} weight[a(i), c] * sum_{j in c} phi(p_ij) v_j
//
// a(i) is the segment of row i, c(j) that of key j. phi is the identity or a contrast.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define FLASHBRUSH_ABI 2
#define FLASHBRUSH_EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {

enum { FB_F32 = 0, FB_BF16 = 1, FB_F16 = 2 };

// A (batch, tokens, heads, dim) tensor. Strides are in elements, 0 broadcasts; the last dimension is
// contiguous.
typedef struct {
  void* data;
  int64_t stride_b, stride_t, stride_h;
} FbTensor;

// A float32 table for each item and head, whose last dimensions are contiguous. A stride of 0 broadcasts.
typedef struct {
  const float* data;  // null: absent
  int64_t stride_b, stride_h;
} FbTable;

typedef struct {
  int32_t abi, dtype;  // dtype of q, k, v and out
  // Items, rows, query heads, key heads, head dim; segments of rows and of keys, softmax groups; tensors of
  // keys: 1 with all segments in their order, or C with one segment each.
  int64_t B, M, H, Hkv, D, R, C, G, L;
  FbTensor q, out;
  const FbTensor *k, *v;                          // [L]
  const int64_t *source_q, *source_k, *source_v;  // [B], [L][B], [L][B]: item to read; null: the item itself
  const int32_t *row_lengths, *key_lengths;       // tokens of a segment: [R] or [B][R]; [C] or [B][C]
  const int32_t* valid;                           // [B][C]: keys of a segment that exist; null: all
  int32_t rows_by_item, keys_by_item;             // whether row_lengths and key_lengths have B items
  const int32_t* groups;                          // [C]
  const float* contrast;  // [G][4]: kind (0 none, 1 unclipped, 2 clipped), beta, lo, hi
  FbTable scale;          // [b][h]
  FbTable bias, weight;   // [b][h][R][C]
  FbTable gain;           // [b][h][R]
  FbTable gates;          // [b][row][G]; stride_h is the stride of a row
  float *lse, *mass;      // outputs [B][H][M][G] (natural log), [B][H][R][C]; null: not wanted
  // A second gain, derived from the mass of (gain_rows, gain_keys) and multiplied into the rows of
  // gain_apply: floor + span * normalise(mass / rows) over the heads of an item.
  int32_t derived;  // normalise: -1 no such gain; 0 minmax, 1 mean, 2 max, 3 softmax
  float span, floor;
  const uint8_t *gain_rows, *gain_keys, *gain_apply;  // [R], [C], [R]: 1 for a segment that counts
  float* gains;  // output [B][H][R]: given gain times derived gain; null: not wanted
  int32_t threads;
} FbAttention;

// Runs worker(data) on `threads` threads and waits for them, as GOMP_parallel does.
typedef void (*FbParallel)(void (*worker)(void*), void* data, unsigned threads, unsigned flags);
}
