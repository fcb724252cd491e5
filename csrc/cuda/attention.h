// The C interface of the attention on a GPU. No torch. All pointers but the lists of tensors are the GPU's.
//
//   s_ij = scale * <q_i, k_j> + bias[a(i), c(j)]      p = softmax over the keys of group(c(j))
//   o_i  = gain[a(i)] * sum_g gate_g(i) * sum_{c in g} weight[a(i), c] * sum_{j in c} phi(p_ij) v_j
//
// phi is the identity or the contrast without clip.
#pragma once
#include <stdint.h>

#define FLASHBRUSH_CUDA_ABI 1
#define FLASHBRUSH_EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {

enum { FB_BF16 = 1, FB_F16 = 2 };
enum { FB_MOST_SEGMENTS = 32, FB_MOST_GROUPS = 8 };

// One (items, tokens, heads, dim) tensor; strides in elements and multiples of 8, the last dimension
// contiguous, the data at a multiple of 16 bytes.
typedef struct {
  void* data;
  int64_t items, tokens, stride_b, stride_t, stride_h;
} FbGpuTensor;

// A float32 table whose last dimensions are contiguous; stride 0 broadcasts an item or a head.
typedef struct {
  const float* data;  // null: absent
  int64_t stride_b, stride_h;
} FbGpuTable;

typedef struct {
  int32_t abi, dtype;
  int32_t B, M, H, Hkv, D, R, C, G, L;  // L tensors of keys: 1, or C of them
  int32_t row_blocks;  // of flashbrush_gpu_block_rows rows, each inside one row segment: as many as the
                       // fullest item has
  int32_t multiprocessors;
  float scale;  // where scales is absent
  FbGpuTensor q, out;
  const FbGpuTensor *k, *v;  // [L] in the caller's memory
  const int64_t *source_q, *source_k,
      *source_v;                           // [B], [L][B], [L][B]; null: the item itself, or the only one
  const int32_t *row_starts, *key_starts;  // [R + 1] or [B][R + 1]; [C + 1] or [B][C + 1]
  const int32_t* valid;                    // [B][C], keys of a segment that exist; null: all
  int32_t rows_by_item, keys_by_item;
  const int32_t* groups;      // [C]
  const int32_t* order;       // [row_blocks], which block comes when; null: as they lie
  FbGpuTable scales;          // [b][h]
  FbGpuTable bias, weight;    // [b][h][R][C]
  FbGpuTable gain;            // [b][h][R]
  FbGpuTable gates;           // [b][row][G]; stride_h is the stride of a row
  const float* contrast;      // [G][4]: kind (0 none, 1 without clip), beta, and two unused; null: none
  const float* value_sums;    // [B][Hkv][C][D], of a contrast
  float *lse, *partial_mass;  // [B][H][M][G], [B][H][row_blocks][warp groups][C]; null: not wanted
} FbGpuAttention;
}
