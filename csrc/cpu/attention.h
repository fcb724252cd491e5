// The C interface of the CPU kernels, and what the dispatcher and the per-ISA files share. No torch, no C++ library.
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

// One (batch, tokens, heads, dim) tensor; strides in elements, the last dimension contiguous; stride 0 broadcasts.
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
  const FbTensor *k, *v;                      // [L]
  const int64_t *source_q, *source_k, *source_v;  // [B], [L][B], [L][B]; null: the item itself
  const int32_t *row_lengths, *key_lengths;   // [R] or [B][R]; [C] or [B][C]
  const int32_t* valid;                       // [B][C], keys of a segment that exist; null: all
  int32_t rows_by_item, keys_by_item;
  const int32_t* groups;   // [C]
  const float* contrast;   // [G][4]: kind (0 none, 1 unclipped, 2 clipped), beta, lo, hi
  FbTable scale;           // [b][h]
  FbTable bias, weight;    // [b][h][R][C]
  FbTable gain;            // [b][h][R]
  FbTable gates;           // [b][row][G]; stride_h is the stride of a row
  float *lse, *mass;       // [B][H][M][G], [B][H][R][C]; null: not wanted
  // Gain derived from the mass of a block of segments, multiplied into the rows of others.
  int32_t derived;         // -1 none; 0 minmax, 1 mean, 2 max, 3 softmax over heads
  float span, floor;
  const uint8_t *gain_rows, *gain_keys, *gain_apply;  // [R], [C], [R]: the segments that count, and that are scaled
  float* gains;            // [B][H][R], the given gain times the derived one; null: not wanted and nothing derived
  int32_t threads;
} FbAttention;

// Runs worker(data) on `threads` threads and waits, as GOMP_parallel does.
typedef void (*FbParallel)(void (*worker)(void*), void* data, unsigned threads, unsigned flags);
}

namespace flashbrush {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// A weight within 2^-60 .. 2^60 is folded into the exponent; float32 holds such probabilities without loss.
constexpr float kFoldLow = 0x1p-60f, kFoldHigh = 0x1p60f;

// A run of keys of one segment inside a tile.
struct Piece {
  int32_t segment, tensor, lane, count;
  int64_t start;  // token within the tensor
};

// Up to tile_keys keys: of one segment, or of several short ones, each lane then with constants of its own.
struct Tile {
  int32_t first_piece, pieces, count;
};

// The tiles of an item, sorted by softmax group.
struct Layout {
  const Tile* tiles;
  const Piece* pieces;
  const int32_t* group_tiles;  // [G + 1]
  int32_t n_tiles;
};

struct RowTask {
  int32_t b, h, segment, slot;  // slot: where the block's mass goes
  int64_t first, count;         // rows
};

struct Packed {
  char *keys, *values;  // n_tiles tiles each
  float* sums;          // [C][padded D]: sums of a segment's values, for the unclipped contrast
};

// What one instruction set offers. Everything in it is plain data, so that no template leaks between files.
struct Kernels {
  const char* isa;
  int32_t tile_keys, row_group, dim_multiple;
  size_t (*key_tile_bytes)(const FbAttention*);
  size_t (*value_tile_bytes)(const FbAttention*);
  size_t (*scratch_bytes)(const FbAttention*, int64_t block_rows);
  void (*pack)(const FbAttention*, const Layout*, int64_t b, int64_t kv_head, int64_t first_tile, int64_t last_tile, const Packed*);
  void (*rows)(const FbAttention*, const Layout*, const RowTask*, const Packed*, float* block_mass, char* scratch);
  void (*scale_rows)(int32_t dtype, void* row, int64_t count, float factor);
};

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

}  // namespace flashbrush
