// Packing of keys, values and rows into the operands of matmul.h.
#pragma once
#include "isa/matmul.h"

namespace {

using namespace flashbrush;

const float kInf = __builtin_inff();

// Pairs of bfloat16 where the hardware multiplies them, else float32.
template <int DTYPE>
constexpr bool pairs() {
  return kHasPairs && DTYPE == FB_BF16;
}

template <int DTYPE>
constexpr int per() {
  return pairs<DTYPE>() ? 2 : 1;
}

template <int DTYPE>
constexpr int group_of() {
  return group_rows<pairs<DTYPE>()>();
}

inline int64_t padded_dim(int64_t D) {
  return round_up(D, W);
}

// Tiles take 16 steps at a time, zeros beyond the head dim.
template <int DTYPE>
inline int64_t dim_steps(int64_t D) {
  return round_up((D + per<DTYPE>() - 1) / per<DTYPE>(), kHasTiles && pairs<DTYPE>() ? 16 : 1);
}

// The rows of a tile's keys or values; a row of zeros stands for the missing ones.
alignas(64) const char kZeros[4 * 1024] = {};

template <int KT>
struct TileRows {
  const char* row[KT];

  TileRows(const FbAttention* p, const Layout* layout, const Tile& tile, const FbTensor* tensors,
           const int64_t* source, int64_t b, int64_t kv) {
    for (int i = tile.count; i < KT; ++i) row[i] = kZeros;
    for (int n = 0; n < tile.pieces; ++n) {
      const Piece& piece = layout->pieces[tile.first_piece + n];
      const int64_t item = source ? source[piece.tensor * p->B + b] : b;
      for (int32_t i = 0; i < piece.count; ++i)
        row[piece.lane + i] = at(tensors[piece.tensor], p->dtype, item, piece.start + i, kv);
    }
  }
};

constexpr int kAhead =
    16;  // rows to fetch ahead: rows of a head lie apart, where the hardware's own prefetching does little

inline void fetch(const char* row, int64_t bytes) {
  for (int64_t x = 0; x < bytes; x += 64) __builtin_prefetch(row + x);
}

// K^T in strips of NV vectors of keys: [strip][step][key]
template <int DTYPE, int KT>
inline void pack_keys(const FbAttention* p, const char* const* rows, uint32_t* out) {
  const int64_t D = p->D, steps = dim_steps<DTYPE>(D), bytes = D * element_size(DTYPE);
  const Strips strips(KT / W);
  for (int i = 0; i < strips.count; ++i) {
    const int first = strips.first(i) * W, width = strips.width(i) * W;
    uint32_t* to = out + first * steps;
    int64_t whole = 0;  // steps that are transposed in registers
#if defined(__AVX512F__)
    if constexpr (pairs<DTYPE>() || DTYPE == FB_F32) whole = D / per<DTYPE>() / 16 * 16;
    for (int j = 0; j < width && whole; j += 16) {
      for (int n = first + j + kAhead; n < first + j + kAhead + 16 && n < KT; ++n) fetch(rows[n], bytes);
      for (int64_t s = 0; s < whole; s += 16) transpose_words(rows + first + j, s, to + s * width + j, width);
    }
#endif
    for (int64_t s = whole; s < steps; ++s)
      for (int j = 0; j < width; ++j) {
        const char* row = rows[first + j];
        if constexpr (pairs<DTYPE>()) {
          const uint16_t* x = (const uint16_t*)row + 2 * s;
          to[s * width + j] = (2 * s < D ? uint32_t(x[0]) : 0) | (2 * s + 1 < D ? uint32_t(x[1]) << 16 : 0);
        } else {
          to[s * width + j] = f32_bits<DTYPE>(row, s);
        }
      }
  }
}

// Rows as B operand whose rows are summed over, in strips of up to NV vectors of the head dim:
// [strip][step][d]
template <int DTYPE>
inline void pack_depth(const char* const* rows, int64_t D, int64_t depth, const Strips& strips,
                       uint32_t* out) {
  constexpr int64_t ahead = kAhead / per<DTYPE>();
  for (int i = 0; i < strips.count; ++i) {
    const int64_t width = strips.width(i) * W, first = int64_t(strips.first(i)) * W;
    const int64_t columns = D - first < width ? D - first : width;
    uint32_t* to = out + first * depth;
    for (int64_t s = 0; s < depth; ++s, to += width) {
      for (int64_t n = 0; i == 0 && s + ahead < depth && n < per<DTYPE>(); ++n)
        fetch(rows[(s + ahead) * per<DTYPE>() + n], D * element_size(DTYPE));
      if constexpr (pairs<DTYPE>()) {
        const uint16_t *even = (const uint16_t*)rows[2 * s] + first,
                       *odd = (const uint16_t*)rows[2 * s + 1] + first;
        for (int64_t d = 0; d < columns; ++d) to[d] = uint32_t(even[d]) | uint32_t(odd[d]) << 16;
      } else {
        for (int64_t d = 0; d < columns; ++d) to[d] = f32_bits<DTYPE>(rows[s], first + d);
      }
      for (int64_t d = columns; d < width; ++d) to[d] = 0;
    }
  }
}

template <int DTYPE, int KT>
inline void pack_values(const FbAttention* p, const TileRows<KT>& rows, uint32_t* out) {
  pack_depth<DTYPE>(rows.row, p->D, KT / per<DTYPE>(), Strips(int(padded_dim(p->D) / W)), out);
}

// sums[d] += the piece's values, which are summed first: a running sum over a segment would gather their
// roundings.
template <int DTYPE>
inline void add_piece(const Piece& piece, const char* const* values, int64_t D, float* sums) {
  float part[256] = {};
  for (int j = piece.lane; j < piece.lane + piece.count; ++j)
    for (int64_t d = 0; d < D; ++d) part[d] += to_f32<DTYPE>(values[j], d);
  for (int64_t d = 0; d < D; ++d) sums[d] += part[d];
}

// Rows of one head as A operand, [rows][steps], padded with rows of zeros.
template <int DTYPE>
inline void pack_rows(const FbAttention* p, const FbTensor& t, int64_t item, const RowTask& task,
                      int64_t padded, uint32_t* out) {
  const int64_t D = p->D, steps = dim_steps<DTYPE>(D);
  for (int64_t i = 0; i < padded; ++i) {
    uint32_t* to = out + i * steps;
    if (i >= task.count) {
      memset(to, 0, size_t(steps) * 4);
      continue;
    }
    const char* row = at(t, p->dtype, item, task.first + i, task.h);
    if (i + kAhead < task.count)
      fetch(at(t, p->dtype, item, task.first + i + kAhead, task.h), D * element_size(DTYPE));
    if constexpr (pairs<DTYPE>()) {
      memset(to + D / 2, 0, size_t(steps - D / 2) * 4);
      memcpy(to, row, size_t(D) * 2);
    } else {
      for (int64_t d = 0; d < D; ++d) to[d] = f32_bits<DTYPE>(row, d);
    }
  }
}

inline float entry(const FbTable& table, int64_t b, int64_t h, int64_t index, float absent) {
  return table.data ? table.data[b * table.stride_b + h * table.stride_h + index] : absent;
}

}  // namespace
