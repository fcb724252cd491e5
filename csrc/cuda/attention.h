// The C interface of attention on a GPU. It has no torch types. Pointers are to GPU memory, but those to
// lists of tensors.
//
//   s_ij = scale * <q_i, k_j> + bias[a(i), c(j)]      p = softmax over the keys of group(c(j))
//   o_i  = gain[a(i)] * sum_g gate_g(i) * sum_{c in g} weight[a(i), c] * sum_{j in c} phi(p_ij) v_j
//
// phi is the identity or the contrast without clip. a(i) is the segment of row i, c(j) that of key j.
#pragma once
#include <stdint.h>

#define FLASHBRUSH_CUDA_ABI 1
#define FLASHBRUSH_EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {

enum { FB_BF16 = 1, FB_F16 = 2 };
enum { FB_MOST_SEGMENTS = 32, FB_MOST_GROUPS = 8 };

// An (items, tokens, heads, dim) tensor. Strides are in elements, multiples of 8; the last dimension is
// contiguous; data is at a multiple of 16 bytes.
typedef struct {
  void* data;
  int64_t items, tokens, stride_b, stride_t, stride_h;
} FbGpuTensor;

// A float32 table for each item and head, whose last dimensions are contiguous. A stride of 0 broadcasts.
typedef struct {
  const float* data;  // null: absent
  int64_t stride_b, stride_h;
} FbGpuTable;

typedef struct {
  int32_t abi, dtype;
  // Items, rows, query heads, key heads, head dim; segments of rows and of keys, softmax groups; tensors of
  // keys: 1 with all segments in their order, or C with one segment each.
  int32_t B, M, H, Hkv, D, R, C, G, L;
  // Blocks of at most flashbrush_gpu_block_rows rows of one segment, as many as the item with the most has.
  int32_t row_blocks;
  int32_t multiprocessors;
  float scale;  // used if scales is absent
  FbGpuTensor q, out;
  const FbGpuTensor *k, *v;  // [L] in the caller's memory
  // [B], [L][B], [L][B]: item to read; null: the item itself, or the only one.
  const int64_t *source_q, *source_k, *source_v;
  const int32_t *row_starts,
      *key_starts;       // first token of a segment: [R + 1] or [B][R + 1]; [C + 1] or [B][C + 1]
  const int32_t* valid;  // [B][C], keys of a segment that exist; null: all
  int32_t rows_by_item, keys_by_item;  // whether row_starts and key_starts have B items
  const int32_t* groups;               // [C]
  const int32_t* order;       // [row_blocks]: the order in which blocks are computed; null: ascending
  FbGpuTable scales;          // [b][h]
  FbGpuTable bias, weight;    // [b][h][R][C]
  FbGpuTable gain;            // [b][h][R]
  FbGpuTable gates;           // [b][row][G]; stride_h is the stride of a row
  const float* contrast;      // [G][4]: kind (0 none, 1 without clip), beta, two unused; null: none
  const float* value_sums;    // [B][Hkv][C][D]: the sum of a segment's values, for a contrast
  float *lse, *partial_mass;  // outputs [B][H][M][G], [B][H][row_blocks][warp groups][C]; null: not wanted
} FbGpuAttention;
}
