// What the schedulers and the kernels of an instruction set share: plain data and one table of functions.
// There are no templates here: the linker could keep a copy compiled for an instruction set that this machine
// lacks.
#pragma once
#include "attention.h"
#include "schedule/backward.h"
#include "schedule/column_mass.h"
#include "schedule/norm_rope.h"

namespace flashbrush {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Keys of a tile in the forward pass: as many as leave K and V of a tile in L2, and one of them in L1.
constexpr int kForwardKeys = 128;
// A float32 sum over a row's keys has three levels: over the keys of a tile, over this many tiles, and over
// those sums. For 5,120 positive terms the mean error is then 1.0 x 2^-24 of the result, 1.5 with two levels
// (simulated).
constexpr int kTilesInSum = 8;
// In the backward pass: K, V, dK and dV of a tile stay in L2 beside the block's rows.
constexpr int kBackwardKeys = 64;
// Keys of a block of column_mass: enough to hide the packing of the queries.
constexpr int64_t kColumnKeys = 192;
// A weight in 2^-60 .. 2^60 is added to the exponent as log2(weight): float32 holds such probabilities
// without loss.
constexpr float kFoldLow = 0x1p-60f, kFoldHigh = 0x1p60f;

// Neighbouring keys of one segment in a tile.
struct Piece {
  int32_t segment, tensor;
  int32_t lane, count;  // keys of the tile: lane .. lane + count
  int64_t start;        // the first one's token in the tensor
};

// Up to kForwardKeys or kBackwardKeys keys of one segment, or of several short segments.
struct Tile {
  int32_t first_piece, pieces, count;  // count: keys
};

// The tiles of an item's keys, sorted by softmax group.
struct Layout {
  const Tile* tiles;
  const Piece* pieces;
  const int32_t* group_tiles;  // [G + 1]: a group's first tile
  int32_t n_tiles;
};

// Rows first .. first + count of one segment, for one item and query head.
struct RowTask {
  int32_t b, h, segment;
  int32_t slot;  // where the mass of these rows goes
  int64_t first, count;
};

// Keys first .. first + count of one segment and tensor; their masses start at key `out` of all tensors'
// keys.
struct ColumnTask {
  int32_t b, h, segment, tensor;
  int64_t first, out, count;
};

// K and V of an (item, key head), packed for products.
struct Packed {
  char *keys, *values;  // [n_tiles] tiles each
  float* sums;          // [C][padded D]: sum of a segment's values, for an unclipped contrast; null: none
};

// The buffers of an (item, key head) in the backward pass.
struct BackwardPacked {
  char *keys, *values, *key_rows;  // [n_tiles] tiles each; key_rows: K as the right operand of dS K
  float *dk, *dv;                  // [n_tiles][keys of a tile][padded D]
};

// Bytes of BackwardPacked's arrays, keys and values being of one size as dk and dv are, and of a thread's
// scratch.
struct BackwardSizes {
  size_t keys, key_rows, gradient, scratch;
  int64_t block_rows;
};

// The few rows that share a key head, and memory for the results of each chunk of its keys.
struct FewRows {
  const FbAttention* call;
  const Layout* layout;
  const RowTask* bands;  // runs of rows of one head and segment, in their order
  int64_t count;         // bands
  int64_t b, kv, rows, chunks;
  char* sums;  // [chunks] of chunk_bytes
  size_t chunk_bytes;
};

// The functions of one instruction set. kv is a key head.
struct Kernels {
  const char* isa;
  // Rows are computed in multiples of row_group, head dims padded to multiples of dim_multiple.
  int32_t row_group, dim_multiple;
  bool multiplies_pairs;  // bfloat16 products are of pairs, in hardware

  // Bytes that the caller allocates.
  size_t (*key_tile_bytes)(const FbAttention*);
  size_t (*value_tile_bytes)(const FbAttention*);
  size_t (*scratch_bytes)(const FbAttention*, int64_t block_rows);  // of a thread
  // Pack the K and V of tiles first_tile .. last_tile.
  void (*pack)(const FbAttention*, const Layout*, int64_t b, int64_t kv, int64_t first_tile,
               int64_t last_tile, const Packed*);
  // Write out and lse of a block of rows, and its masses to block_mass[slot][C].
  void (*rows)(const FbAttention*, const Layout*, const RowTask*, const Packed*, float* block_mass,
               char* scratch);
  // Multiply one row of out by a factor for each head.
  void (*scale_row)(const FbAttention*, int64_t b, int64_t row, const float* factors);

  size_t (*few_rows_sums)(const FbAttention*);     // bytes of a chunk's results
  size_t (*few_rows_scratch)(const FbAttention*);  // bytes of a thread's scratch
  // The rows against tiles first_tile .. last_tile; the second sweep applies a clipped contrast.
  void (*few_rows_sweep)(const FewRows*, int64_t chunk, int32_t first_tile, int32_t last_tile, bool second,
                         char* scratch);
  void (*few_rows_merge)(const FewRows*);   // the chunks' results into the first chunk's, and lse and mass
  void (*few_rows_finish)(const FewRows*);  // write out

  BackwardSizes (*backward_sizes)(const FbAttention*, int64_t tiles);
  // dq of a key head's rows, and its dk and dv.
  void (*backward_unit)(const FbBackward*, const Layout*, const RowTask* blocks, int64_t count, int64_t b,
                        int64_t kv, const BackwardPacked*, char* scratch);

  size_t (*column_mass_scratch)(const FbAttention*);
  void (*column_mass_block)(const FbColumnMass*, const ColumnTask*, char* scratch);

  void (*norm_rope_token)(const FbNormRope*, int64_t b, int64_t token);
  // `part`: the row of dweight that this token's gradient is added to.
  void (*norm_rope_backward_token)(const FbNormRopeBackward*, int64_t b, int64_t token, int64_t part);
};

inline int64_t round_up(int64_t x, int64_t to) {
  return (x + to - 1) / to * to;
}

}  // namespace flashbrush
