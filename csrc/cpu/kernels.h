// What the schedulers and the per-ISA files share: plain data and one table of functions, so that no template
// leaks from a file that is compiled for one instruction set into another.
#pragma once
#include "attention.h"
#include "schedule/backward.h"
#include "schedule/column_mass.h"
#include "schedule/norm_rope.h"

namespace flashbrush {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kForwardKeys =
    128;  // of a tile: long sums in PV; K and V of a tile stay in L2, and K or V in L1
// A float32 sum over a row's keys has three levels: over the keys of a tile, over this many tiles, over those
// sums. Simulated for 5,120 positive terms: the mean error is 1.0 x 2^-24 of the result, 1.5 with two levels.
constexpr int kTilesInSum = 8;
constexpr int kBackwardKeys = 64;     // K, V, dK and dV of a tile stay in L2 beside the block's rows
constexpr int64_t kColumnKeys = 192;  // of a block: many enough to hide the packing of the queries
// A weight within 2^-60 .. 2^60 is folded into the exponent; float32 holds such probabilities without loss.
constexpr float kFoldLow = 0x1p-60f, kFoldHigh = 0x1p60f;

// A run of keys of one segment inside a tile.
struct Piece {
  int32_t segment, tensor, lane, count;
  int64_t start;  // token within the tensor
};

// Up to kForwardKeys or kBackwardKeys keys: of one segment, or of several short ones, each lane then with
// constants of its own.
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

// Keys first .. first + count of one tensor and segment, whose masses go to `place` on.
struct ColumnTask {
  int32_t b, h, segment, tensor;
  int64_t first, place, count;
};

struct Packed {
  char *keys, *values;  // n_tiles tiles each
  float* sums;          // [C][padded D]: sums of a segment's values, for the unclipped contrast
};

// Buffers of one (item, key head) in the gradient.
struct BackwardPacked {
  char *keys, *values, *key_rows;
  float *dk, *dv;
};

struct BackwardSizes {
  size_t keys, key_rows, gradient,
      scratch;  // bytes: keys (values are alike), key_rows, dk (dv is alike), of a thread
  int64_t block_rows;
};

// The few rows that share a key head, and memory for the sums of its chunks of keys.
struct FewRows {
  const FbAttention* call;
  const Layout* layout;
  const RowTask* bands;  // runs of rows of one head and segment, in order
  int64_t count;         // bands
  int64_t b, kv, rows, chunks;
  char* sums;
  size_t chunk_bytes;
};

// What one instruction set offers.
struct Kernels {
  const char* isa;
  int32_t row_group, dim_multiple;
  bool multiplies_pairs;  // of bfloat16
  size_t (*key_tile_bytes)(const FbAttention*);
  size_t (*value_tile_bytes)(const FbAttention*);
  size_t (*scratch_bytes)(const FbAttention*, int64_t block_rows);
  void (*pack)(const FbAttention*, const Layout*, int64_t b, int64_t kv_head, int64_t first_tile,
               int64_t last_tile, const Packed*);
  void (*rows)(const FbAttention*, const Layout*, const RowTask*, const Packed*, float* block_mass,
               char* scratch);
  void (*scale_row)(const FbAttention*, int64_t b, int64_t row,
                    const float* factors);         // of out; a factor a head
  size_t (*few_rows_sums)(const FbAttention*);     // bytes of a chunk
  size_t (*few_rows_scratch)(const FbAttention*);  // bytes of a thread
  void (*few_rows_sweep)(const FewRows*, int64_t chunk, int32_t first_tile, int32_t last_tile, bool second,
                         char* scratch);
  void (*few_rows_merge)(const FewRows*);
  void (*few_rows_finish)(const FewRows*);
  BackwardSizes (*backward_sizes)(const FbAttention*, int64_t tiles);
  void (*backward_unit)(const FbBackward*, const Layout*, const RowTask* blocks, int64_t count, int64_t b,
                        int64_t kv_head, const BackwardPacked*, char* scratch);
  size_t (*column_mass_scratch)(const FbAttention*);
  void (*column_mass_block)(const FbColumnMass*, const ColumnTask*, char* scratch);
  void (*norm_rope_token)(const FbNormRope*, int64_t b, int64_t token);
  void (*norm_rope_backward_token)(const FbNormRopeBackward*, int64_t b, int64_t token, int64_t part);
};

inline int64_t round_up(int64_t x, int64_t to) {
  return (x + to - 1) / to * to;
}

}  // namespace flashbrush
