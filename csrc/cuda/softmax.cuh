// The softmax of a warp group's 64 rows, of which a thread holds two (i = 0, 1: eight rows apart) with a
// quarter of their logits: register 4 j + 2 i + e is key 8 j + 2 (lane % 4) + e of row i.
#pragma once
#include "plan.cuh"

namespace flashbrush {

// The maximum moves only when a logit exceeds it by so many binary digits: probabilities are floating point,
// so that their scale costs no precision, and a row is rarely rescaled after its first tile.
constexpr float kSlack = 8.f;

// A number to subtract from logits: rows without a finite one have maximum -inf.
FB_DEVICE float pivot(float m) {
  return m == -kInf ? 0.f : m;
}

// Summed over the four threads that share a row.
FB_DEVICE float over_row(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// 2^x on the units for multiplications: x = n + f with |f| <= 1/2, a polynomial for 2^f (least largest
// relative error, 7.5e-5: a fiftieth of what bfloat16 rounds away), times 2^n. Below 2^-126 it is 2^-126.
FB_DEVICE float exp2_multiplied(float x) {
  x = maximum_or_nan(x, -126.f);
  const float rounder = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded, and lies in its low bits
  const float n = x + rounder, f = x - (n - rounder);
  const float y = ((5.517148e-2f * f + 2.4261131e-1f) * f + 6.9326103e-1f) * f + 9.9992806e-1f;
  return y * bits_to_float((float_to_bits(n) << 23) + 0x3f800000);
}

struct RowSums {
  float m[2], l[2];  // maximum in log2 units; sum of 2^(s - m) without weights, this thread's share of it
  float segment[2];  // of the running segment, with its weight
  float shift;       // the output so far is 2^-shift too small; -inf: there is none

  FB_INLINE void clear() {
#pragma unroll
    for (int i = 0; i < 2; ++i) m[i] = -kInf, l[i] = segment[i] = 0.f;
    shift = -kInf;
  }
  // What P of a segment is multiplied by, once it is summed: not 1 where another segment's weight is 2^60
  // times as large.
  FB_INLINE float thinning(float shift_of_segment) const { return exp2_fast(shift_of_segment - shift); }
};

// What a tile is to the rows.
struct Tile {
  int keys;
  float add, shift;
  template <int KEYS>
  FB_INLINE explicit Tile(const Cursor<KEYS>& at)
      : keys(at.keys()), add(at.visit->add), shift(at.visit->shift) {}
};

// A tile's logits -> its probabilities in place; the sums gain theirs. Where the output has to be rescaled
// the result is true, alike in a warp, and decay becomes its factors. Of 16 logits POLYNOMIAL go through
// exp2_multiplied.
template <int KEYS, int POLYNOMIAL>
FB_DEVICE bool softmax_tile(float (&s)[KEYS / 2], RowSums& sums, float (&decay)[2], float scale,
                            const Tile& tile, int lane) {
  if (scale < 0.f) {
    scale = -scale;
#pragma unroll
    for (int n = 0; n < KEYS / 2; ++n) s[n] = -s[n];
  }
  if (tile.keys < KEYS) {
    const int last = tile.keys - 2 * (lane % 4);
#pragma unroll
    for (int n = 0; n < KEYS / 2; ++n)
      if (8 * (n / 4) + n % 2 >= last) s[n] = -kInf;
  }
  // Two chains a row for a maximum and a sum, which one warp alone would wait for link by link.
  float top[2] = {-kInf, -kInf}, other[2] = {-kInf, -kInf};
#pragma unroll
  for (int n = 0; n < KEYS / 2; n += 2) {
    top[n / 2 % 2] = maximum(top[n / 2 % 2], s[n]);
    other[n / 2 % 2] = maximum(other[n / 2 % 2], s[n + 1]);
  }
  bool raised = tile.shift > sums.shift;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    top[i] = maximum(top[i], other[i]);
    top[i] = maximum(top[i], shuffle_xor(top[i], 1));
    top[i] = maximum(top[i], shuffle_xor(top[i], 2)) * scale + tile.add;
    raised |= top[i] > sums.m[i] + kSlack;
  }
  raised = any_of_warp(raised);
  if (raised) {
    const float shift = maximum(sums.shift, tile.shift);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float m = maximum(sums.m[i], top[i]);
      const float factor = exp2_fast(sums.m[i] - pivot(m));
      sums.m[i] = m;
      sums.l[i] *= factor;
      sums.segment[i] *= factor;
      decay[i] = factor * exp2_fast(sums.shift - shift);
    }
    sums.shift = shift;
  }
  const float offset[2] = {tile.add - pivot(sums.m[0]), tile.add - pivot(sums.m[1])};
#pragma unroll
  for (int n = 0; n < KEYS / 2; ++n) {
    const float t = s[n] * scale + offset[n / 2 % 2];
    s[n] = POLYNOMIAL > 0 && n % 16 < POLYNOMIAL ? exp2_multiplied(t) : exp2_fast(t);
  }
  float odd[2] = {0.f, 0.f};
#pragma unroll
  for (int n = 0; n < KEYS / 2; n += 2) {
    sums.segment[n / 2 % 2] += s[n];
    odd[n / 2 % 2] += s[n + 1];
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) sums.segment[i] += odd[i];
  return raised;
}

// A tile's probabilities as the left operand of its product with V, 16 keys each.
template <typename T, int KEYS>
FB_DEVICE void pack_probabilities(float (&s)[KEYS / 2], float thinning, uint32_t (&p)[KEYS / 16][4]) {
  if (thinning != 1.f) {
#pragma unroll
    for (int n = 0; n < KEYS / 2; ++n) s[n] *= thinning;
  }
#pragma unroll
  for (int k = 0; k < KEYS / 16; ++k)
#pragma unroll
    for (int n = 0; n < 4; ++n) p[k][n] = pack<T>(s[8 * k + 2 * n], s[8 * k + 2 * n + 1]);
}

}  // namespace flashbrush
