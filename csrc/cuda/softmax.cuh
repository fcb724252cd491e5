// The online softmax of a warp group's 64 rows. A thread holds a quarter of the logits of two rows i = 0, 1,
// which are 8 rows apart: register 4 j + 2 i + e is key 8 j + 2 (lane % 4) + e of row i.
#pragma once
#include "block_work.cuh"

namespace flashbrush {

// m moves only when a logit, in log2 units, exceeds it by more than this: probabilities are floating point,
// so their scale costs no precision, and a row is rarely rescaled after its first tile.
constexpr float kSlack = 8.f;

// What to subtract from logits: m, or 0 where no logit so far is finite.
FB_DEVICE float pivot(float m) {
  return m == -kInf ? 0.f : m;
}

// The sum over the four threads that share a row.
FB_DEVICE float over_row(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// 2^x on the multiply units instead of the special function units: x = n + f with |f| <= 1/2, a minimax
// polynomial for 2^f (relative error 7.5e-5, a fiftieth of bfloat16's rounding) times 2^n. Below 2^-126 the
// result is 2^-126.
FB_DEVICE float exp2_multiplied(float x) {
  x = maximum_or_nan(x, -126.f);
  const float rounder = 12582912.f;  // adding 1.5 * 2^23 rounds to an integer, in the low bits
  const float n = x + rounder, f = x - (n - rounder);
  const float y = ((5.517148e-2f * f + 2.4261131e-1f) * f + 6.9326103e-1f) * f + 9.9992806e-1f;
  return y * bits_to_float((float_to_bits(n) << 23) + 0x3f800000);
}

struct RowSums {
  float m[2], l[2];  // maximum in log2 units; this thread's share of the sum of 2^(s - m), without weights
  float segment[2];  // this thread's share of the sum of P of the segment that is being visited
  float shift;       // the output so far is to be multiplied by 2^shift; -inf: there is none

  FB_INLINE void clear() {
#pragma unroll
    for (int i = 0; i < 2; ++i) m[i] = -kInf, l[i] = segment[i] = 0.f;
    shift = -kInf;
  }
  // What P of a segment is multiplied by for the output. It is 1 if all weights are in 2^-30 .. 2^30.
  FB_INLINE float shift_factor(float shift_of_segment) const { return exp2_fast(shift_of_segment - shift); }
};

// The constants of a tile.
struct TileTerms {
  int keys;
  float add, shift;
  template <int KEYS>
  FB_INLINE explicit TileTerms(const Cursor<KEYS>& at)
      : keys(at.keys()), add(at.visit->add), shift(at.visit->shift) {}
};

// A tile's logits s -> its probabilities, in place; adds them to the sums. Returns true, for a whole warp, if
// the output so far has to be multiplied by decay. POLYNOMIAL of 16 logits go through exp2_multiplied.
template <int KEYS, int POLYNOMIAL>
FB_DEVICE bool softmax_tile(float (&s)[KEYS / 2], RowSums& sums, float (&decay)[2], float scale,
                            const TileTerms& tile, int lane) {
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
  // Two chains of maxima a row, and two of sums below: one chain would wait for the latency of each
  // operation.
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

// The probabilities times shift_factor as the left operand of P V: p[k] holds keys 16 k .. 16 k + 15.
template <typename T, int KEYS>
FB_DEVICE void pack_probabilities(float (&s)[KEYS / 2], float shift_factor, uint32_t (&p)[KEYS / 16][4]) {
  if (shift_factor != 1.f) {
#pragma unroll
    for (int n = 0; n < KEYS / 2; ++n) s[n] *= shift_factor;
  }
#pragma unroll
  for (int k = 0; k < KEYS / 16; ++k)
#pragma unroll
    for (int n = 0; n < 4; ++n) p[k][n] = pack<T>(s[8 * k + 2 * n], s[8 * k + 2 * n + 1]);
}

}  // namespace flashbrush
