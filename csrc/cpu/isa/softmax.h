// The online softmax of a row over tiles of keys: t = s * scale + add in log2 units, P = exp2(t - m), l = sum
// of P.
//
// m starts as the maximum of the row's first tile. It moves only when a probability exceeds kSlack:
// probabilities are floating point, so their scale costs no precision, and moving m costs a pass over what
// was summed so far.
#pragma once
#include "isa/pack.h"

namespace {

constexpr float kSlack = 256.f;  // how large the sum of a lane may be before its row is rescaled

// What becomes of the probabilities of a tile.
enum Mode {
  kFold,  // P = exp2(t - m), where t contains log2(weight)
  kSum,   // only l is summed: the first sweep of a clipped contrast, or weight 0
  kPost,  // P = exp2(t - m) * post; l is summed without post
  kClip,  // P = clip(beta * exp2(t - lse) - shift, lo, hi) * post; m holds lse
};

// The constants of a tile for the rows of one segment.
struct Constants {
  float scale, add, post;
  float beta, shift, lo, hi;          // of kClip
  const float *lane_add, *lane_post;  // [kForwardKeys]: add and post of each key where they differ, else null
};

// The sums of a row so far: l (a number), lanes[W] the running segment's part of l, o[padded D] = P V.
// before[W + padded D]: finished sums of lanes and of o, of kTilesInSum tiles each; null: none are kept.
struct RowSums {
  float *m, *l, *lanes, *o, *before;
};

// N vectors of probabilities as a row of operand a.
template <int DTYPE, int N>
inline void store_prob(uint32_t* prob, const vf* e) {
  if constexpr (pairs<DTYPE>()) {
#if defined(__AVX512BF16__)
#pragma GCC unroll 16
    for (int j = 0; j < N; j += 2)
      _mm512_storeu_si512(prob + j / 2 * W, (__m512i)_mm512_cvtne2ps_pbh(e[j + 1], e[j]));
#endif
  } else {
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) store((float*)prob + j * W, e[j]);
  }
}

// Raises m to the maximum of the logits s[N * W] and rescales the sums. Called rarely, so never inlined; it
// takes pointers one by one, because the caller would have to build a RowSums in memory for every row.
template <int N>
__attribute__((noinline, cold)) void rescale(float* m, float* l, float* lanes, float* o, float* before,
                                             const float* s, const Constants& c, int64_t DP) {
  vf top = splat(-kInf);
  for (int j = 0; j < N * W; j += W)
    top = maximum(fma(load(s + j), splat(c.scale), c.lane_add ? load(c.lane_add + j) : splat(c.add)), top);
  const float raised = largest(top);
  if (!(raised > *m)) return;
  const float factor = *m == -kInf ? 0.f : __builtin_exp2f(*m - raised);
  *m = raised;
  *l *= factor;
  store(lanes, load(lanes) * splat(factor));
  for (int64_t d = 0; d < DP; d += W) store(o + d, load(o + d) * splat(factor));
  for (int64_t i = 0; before && i < W + DP; i += W) store(before + i, load(before + i) * splat(factor));
}

// One row of a tile: logits s[N * W] -> probabilities as a row of operand a; m, l and lanes follow.
template <int DTYPE, int MODE, bool LANES, int N>
inline __attribute__((always_inline)) void softmax_row(const RowSums& x, float* s, uint32_t* prob,
                                                       const Constants& c, int64_t DP) {
  constexpr int DEGREE = DTYPE == FB_F32 ? 5 : 4;
  vf t[N];
  const vf scale = splat(c.scale);
  vf total = splat(0.f);
  auto exponentials = [&] {
    const float m = MODE != kClip && *x.m == -kInf ? 0.f : *x.m;
    total = splat(0.f);
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      t[j] = exp2<DEGREE>(
          fma(load(s + j * W), scale, LANES ? load(c.lane_add + j * W) - splat(m) : splat(c.add - m)));
      total = total + t[j];
    }
  };
  if (MODE != kClip && __builtin_expect(*x.m == -kInf, 0))
    rescale<N>(x.m, x.l, x.lanes, x.o, x.before, s, c, DP);
  exponentials();
  // A probability above kSlack shows in the sum of its lane: m has to move.
  if (MODE != kClip && __builtin_expect(any_greater(total, splat(kSlack)), 0)) {
    rescale<N>(x.m, x.l, x.lanes, x.o, x.before, s, c, DP);
    exponentials();
  }
  if constexpr (MODE == kPost || MODE == kClip)
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      const vf post = LANES ? load(c.lane_post + j * W) : splat(c.post);
      vf e = t[j];
      if constexpr (MODE == kPost) {
        store(s + j * W, e);  // the masses of a tile with several segments are summed from s
      } else {
        e = maximum(splat(c.lo), fma(e, splat(c.beta), splat(-c.shift)));
        e = -maximum(splat(-c.hi), -e);
      }
      e = keep_from(post, splat(1e-45f), e * post);
      // A lane with add = -inf has no key: phi(0) must not count.
      if (MODE == kClip && LANES) e = keep_from(load(c.lane_add + j * W), splat(-3e38f), e);
      t[j] = e;
    }
  if constexpr (MODE != kClip) store(x.lanes, load(x.lanes) + total);
  if constexpr (MODE != kSum) store_prob<DTYPE, N>(prob, t);
}

// Table entries of the rows' segment and key segment c.
inline float bias_of(const FbAttention* p, const RowTask& rows, int64_t c) {
  return entry(p->bias, rows.b, rows.h, rows.segment * p->C + c, 0.f);
}

inline float weight_of(const FbAttention* p, const RowTask& rows, int64_t c) {
  return entry(p->weight, rows.b, rows.h, rows.segment * p->C + c, 1.f);
}

// How many keys of a group exist and are not removed for these rows: Nk of the contrast.
inline int64_t allowed_keys(const FbAttention* p, const Layout* layout, const RowTask& rows, int64_t g) {
  int64_t count = 0;
  for (int32_t n = layout->group_tiles[g]; n < layout->group_tiles[g + 1]; ++n)
    for (int i = 0; i < layout->tiles[n].pieces; ++i) {
      const Piece& piece = layout->pieces[layout->tiles[n].first_piece + i];
      if (bias_of(p, rows, piece.segment) != -kInf) count += piece.count;
    }
  return count;
}

// How the rows of a task compute a tile.
struct TileUse {
  bool computed;  // false: the tile adds nothing to these rows
  Mode mode;
  float unfold;  // sums of P times this are sums without the folded weight
};

// For a tile whose first segment is not removed. `mode` is kFold, kSum or kClip; k has its scale and the
// constants of kClip, the others are set here. lane_add and lane_post are memory for [kForwardKeys] numbers
// each.
inline TileUse use_tile(const FbAttention* p, const Layout* layout, const Tile& tile, const RowTask& rows,
                        Mode mode, Constants& k, float* lane_add, float* lane_post) {
  constexpr int KT = kForwardKeys;
  const Piece* pieces = layout->pieces + tile.first_piece;
  const int64_t c = pieces[0].segment;
  const bool mixed = tile.pieces > 1;
  float unfold = 1.f;
  k.add = 0.f, k.post = 1.f, k.lane_add = k.lane_post = nullptr;
  if (!mixed) {
    const float w = weight_of(p, rows, c);
    k.add = bias_of(p, rows, c) * kLog2e;
    if (mode == kFold && w != 1.f) {
      if (w == 0.f) {
        mode = kSum;
      } else if (w >= kFoldLow && w <= kFoldHigh) {
        k.add += __builtin_log2f(w);
        unfold = 1.f / w;
      } else {
        mode = kPost;
      }
    }
    if (mode == kClip && w == 0.f) return {false, mode, unfold};
    k.post = w;
  } else if (mode == kFold) {
    mode = kPost;
  }
  if (mixed || (tile.count != KT && tile.count != KT / 2)) {
    for (int j = 0; j < KT; ++j) lane_add[j] = -kInf, lane_post[j] = 0.f;
    for (int i = 0; i < tile.pieces; ++i)
      for (int j = pieces[i].lane; j < pieces[i].lane + pieces[i].count; ++j) {
        lane_add[j] = mixed ? bias_of(p, rows, pieces[i].segment) * kLog2e : k.add;
        lane_post[j] = weight_of(p, rows, pieces[i].segment);
      }
    k.lane_add = lane_add, k.lane_post = lane_post;
  }
  return {true, mode, unfold};
}

}  // namespace
