// Packs keys, values and rows into the operands of matmul.h. Packing costs one pass and pays off over many
// rows: products then read memory in order, whatever the strides of the tensors.
#pragma once
#include "isa/matmul.h"

namespace {

using namespace flashbrush;

const float kInf = __builtin_inff();

// Whether packed elements are pairs of bfloat16, not float32.
template <int DTYPE>
constexpr bool pairs() {
  return kHasPairs && DTYPE == FB_BF16;
}

// Numbers of a packed element.
template <int DTYPE>
constexpr int per() {
  return pairs<DTYPE>() ? 2 : 1;
}

// Rows of one product.
template <int DTYPE>
constexpr int group_of() {
  return group_rows<pairs<DTYPE>()>();
}

inline int64_t padded_dim(int64_t D) {
  return round_up(D, W);
}

// Steps of a product over the head dim: AMX takes 16 at a time, of zeros beyond the head dim.
template <int DTYPE>
inline int64_t dim_steps(int64_t D) {
  return round_up((D + per<DTYPE>() - 1) / per<DTYPE>(), kHasAmx && pairs<DTYPE>() ? 16 : 1);
}

alignas(64) const char kZeros[4 * 1024] = {};  // a row of zeros, of 256 numbers of any dtype

// Pointers to the keys or values of a tile; those beyond tile.count point to zeros.

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

// Rows to prefetch ahead. The rows of a head are H * D elements apart, which hardware prefetchers rarely
// follow.
constexpr int kAhead = 16;

inline void fetch(const char* row, int64_t bytes) {
  for (int64_t x = 0; x < bytes; x += 64) __builtin_prefetch(row + x);
}

// Keys as operand b of Q K^T, in strips of up to NV vectors of keys: [strip][step][key].
template <int DTYPE, int KT>
inline void pack_keys(const FbAttention* p, const char* const* rows, uint32_t* out) {
  const int64_t D = p->D, steps = dim_steps<DTYPE>(D);
  const Strips strips(KT / W);
  for (int i = 0; i < strips.count; ++i) {
    const int first = strips.first(i) * W, width = strips.width(i) * W;
    uint32_t* to = out + first * steps;
    int64_t whole = 0;  // steps that are transposed 16 x 16 in registers
#if defined(__AVX512F__)
    if constexpr (pairs<DTYPE>() || DTYPE == FB_F32) whole = D / per<DTYPE>() / 16 * 16;
    for (int j = 0; j < width && whole; j += 16) {
      for (int n = first + j + kAhead; n < first + j + kAhead + 16 && n < KT; ++n)
        fetch(rows[n], D * element_size(DTYPE));
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

// Rows as operand b of a product that sums over rows, in strips of up to NV vectors of the head dim:
// [strip][step][d]. depth: steps, of per rows each.
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

// Values as operand b of P V.
template <int DTYPE, int KT>
inline void pack_values(const FbAttention* p, const TileRows<KT>& rows, uint32_t* out) {
  pack_depth<DTYPE>(rows.row, p->D, KT / per<DTYPE>(), Strips(int(padded_dim(p->D) / W)), out);
}

// sums[D] += the sum of a piece's values. Summing the piece first keeps running sums short, see kTilesInSum.
template <int DTYPE>
inline void add_piece(const Piece& piece, const char* const* values, int64_t D, float* sums) {
  float part[256] = {};
  for (int j = piece.lane; j < piece.lane + piece.count; ++j)
    for (int64_t d = 0; d < D; ++d) part[d] += to_f32<DTYPE>(values[j], d);
  for (int64_t d = 0; d < D; ++d) sums[d] += part[d];
}

// Rows of a task as operand a, [padded][steps]; rows beyond task.count are zeros.
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

// Entry `index` of an item's and head's table, or `absent` where there is no table.
inline float entry(const FbTable& table, int64_t b, int64_t h, int64_t index, float absent) {
  return table.data ? table.data[b * table.stride_b + h * table.stride_h + index] : absent;
}

}  // namespace
