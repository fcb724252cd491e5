// The backward pass for one instruction set: the blocks of rows of an (item, key head) against all tiles of
// keys. schedule/backward.h has the formulas.
//
// A block of rows and a tile of 64 keys give S = Q K^T and dP = dO V^T (6 rows at a time, 16 with AMX), these
// give P and dS, and then come three products: dQ += dS K, dV += P^T dO, dK += dS^T Q, the last two after P
// and dS were transposed in 16 x 16 blocks. dK and dV of a head are float32 sums until its last row. One
// thread adds to them, in order.
#include "schedule/backward.h"
#include "isa/pack.h"
#include "isa/scratch.h"

namespace {

constexpr int64_t kRows = 96;  // of a block: a multiple of 6 and 16 rows, and of 16 pairs of rows
constexpr int KT = kBackwardKeys;

// Keys of a tile as rows of dK and dV: KT rounded up to whole products.
template <int DTYPE>
constexpr int transposed_rows() {
  return (KT + group_of<DTYPE>() - 1) / group_of<DTYPE>() * group_of<DTYPE>();
}

// Scratch of a thread. per: numbers of a packed element; MR: rows of one product.
struct Scratch {
  uint32_t *q, *dout;                  // [kRows][steps], operand a
  uint32_t *q_columns, *dout_columns;  // [kRows / per][padded D], operand b
  uint32_t* ds;                        // [kRows][KT / per], operand a
  uint32_t *prob_t, *ds_t;             // [transposed_rows][kRows / per], operand a
  uint32_t *prob_pairs, *ds_pairs;     // [kRows / per][KT], to be transposed into the two above
  float *s, *dp;                       // [MR][KT]
  float* dq;                           // [kRows][padded D]
  float *lse, *delta, *factor;         // [G][kRows]: lse in log2 units; sum of p dP; gain * gate

  template <int DTYPE>
  size_t assign(const FbAttention* p, char* base) {
    Arena arena{base};
    constexpr int PER = per<DTYPE>(), MR = group_of<DTYPE>(), KTP = transposed_rows<DTYPE>();
    const int64_t DP = padded_dim(p->D), steps = dim_steps<DTYPE>(p->D);
    arena.take(q, kRows * steps);
    arena.take(dout, kRows * steps);
    arena.take(q_columns, kRows / PER * DP);
    arena.take(dout_columns, kRows / PER * DP);
    arena.take(ds, kRows * KT / PER);
    arena.take(prob_t, KTP * kRows / PER);
    arena.take(ds_t, KTP * kRows / PER);
    arena.take(prob_pairs, kRows / PER * KT);
    arena.take(ds_pairs, kRows / PER * KT);
    arena.take(s, MR * KT);
    arena.take(dp, MR * KT);
    arena.take(dq, kRows * DP);
    arena.take(lse, p->G * kRows);
    arena.take(delta, p->G * kRows);
    arena.take(factor, p->G * kRows);
    return arena.bytes;
  }
};

// Rows of a task as operand b of products with P^T and dS^T, which sum over rows: [strip][step][d]. kRows
// rows, those beyond task.count zeros.
template <int DTYPE>
void pack_columns(const FbAttention* p, const FbTensor& t, int64_t item, const RowTask& task, uint32_t* out) {
  constexpr int PER = per<DTYPE>();
  const int64_t D = p->D, depth = kRows / PER;
  const Strips strips(int(padded_dim(D) / W));
  const char* rows[kRows];
  for (int64_t i = 0; i < kRows; ++i)
    rows[i] = i < task.count ? at(t, p->dtype, item, task.first + i, task.h) : kZeros;
  pack_depth<DTYPE>(rows, D, depth, strips, out);
}

// The constants of a tile for the rows of one segment.
struct Constants {
  float scale, add, weight;
  const float *lane_add, *lane_weight;  // [KT]: add and weight of each key where they differ, else null
};

// Two rows of a tile as they are transposed: with pairs word j holds (even[j], odd[j]), else the rows follow
// each other.
template <int DTYPE>
inline void store_pairs(uint32_t* to, const vf* even, const vf* odd) {
#if defined(__AVX512BF16__)
  if constexpr (pairs<DTYPE>()) {
#pragma GCC unroll 16
    for (int j = 0; j < KT / W; ++j) {
      const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even[j]));
      const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd[j]));
      _mm512_storeu_si512(to + j * W, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
#endif
  if constexpr (!pairs<DTYPE>())
    for (int j = 0; j < KT / W; ++j) {
      store((float*)to + j * W, even[j]);
      store((float*)to + KT + j * W, odd[j]);
    }
}

// One row of a tile as a row of operand a.
template <int DTYPE>
inline void store_operand(uint32_t* to, const vf* x) {
#if defined(__AVX512BF16__)
  if constexpr (pairs<DTYPE>()) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]));
    _mm512_storeu_si512(to + W, (__m512i)_mm512_cvtne2ps_pbh(x[3], x[2]));
  }
#endif
  if constexpr (!pairs<DTYPE>())
    for (int j = 0; j < KT / W; ++j) store((float*)to + j * W, x[j]);
}

// from[kRows / per][KT] -> to[KT][kRows / per]
template <int DTYPE>
inline void transpose(const uint32_t* from, uint32_t* to) {
  constexpr int64_t depth = kRows / per<DTYPE>();
#if defined(__AVX512F__)
  const char* rows[16];
  for (int64_t i = 0; i < depth; i += 16) {
    for (int r = 0; r < 16; ++r) rows[r] = (const char*)(from + (i + r) * KT);
    for (int j = 0; j < KT; j += 16) transpose_words(rows, j, to + j * depth + i, depth);
  }
#else
  for (int64_t i = 0; i < depth; ++i)
    for (int j = 0; j < KT; ++j) to[j * depth + i] = from[i * KT + j];
#endif
}

// Rows `row` and `row` + 1 of the block, at s[r] and s[r + 1]: P = exp2(t - lse), dP = <dO, v> factor weight,
// dS = P (dP - delta) scale. With DELTA only delta += sum of P dP.
template <int DTYPE, bool LANES, bool DELTA>
inline void row_pair(Scratch& x, int64_t row, int r, int64_t g, const Constants& c) {
  constexpr int N = KT / W;
  vf prob[2][N], ds[2][N];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const int64_t i = g * kRows + row + half;
    const float *s = x.s + (r + half) * KT, *dp = x.dp + (r + half) * KT;
    const vf lse = splat(x.lse[i]), delta = splat(x.delta[i]), factor = splat(x.factor[i]);
    vf total = splat(0.f);
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      const vf add = LANES ? load(c.lane_add + j * W) : splat(c.add);
      const vf p = exp2<5>(fma(load(s + j * W), splat(c.scale * kLog2e), add - lse));
      const vf weight = LANES ? load(c.lane_weight + j * W) : splat(c.weight), a = factor * weight;
      const vf scaled =
          keep_from(weight, splat(1.4e-45f), load(dp + j * W)) * a;  // 0 at weight 0, even for a value of NaN
      if (DELTA) {
        total = total + p * scaled;
      } else {
        prob[half][j] = p * a;
        ds[half][j] = p * (scaled - delta) * splat(c.scale);
      }
    }
    if (DELTA) x.delta[i] += sum(total);
  }
  if constexpr (!DELTA) {
    constexpr int PER = per<DTYPE>();
    store_pairs<DTYPE>(x.prob_pairs + row / PER * KT, prob[0], prob[1]);
    store_pairs<DTYPE>(x.ds_pairs + row / PER * KT, ds[0], ds[1]);
    for (int half = 0; half < 2; ++half) store_operand<DTYPE>(x.ds + (row + half) * (KT / PER), ds[half]);
  }
}

// A block of rows against one tile: P and dS in the forms that the products want. With DELTA only delta is
// summed.
template <int DTYPE, bool LANES, bool DELTA>
void tile_rows(const FbAttention* p, Scratch& x, int64_t g, const Constants& c, const uint32_t* keys,
               const uint32_t* values) {
  constexpr bool PAIRS = pairs<DTYPE>();
  constexpr int MR = group_of<DTYPE>();
  const int64_t steps = dim_steps<DTYPE>(p->D);
  for (int64_t first = 0; first < kRows; first += MR) {
    multiply_strips<PAIRS, false>(steps, x.q + first * steps, steps, keys, steps, Strips(KT / W), x.s, KT);
    multiply_strips<PAIRS, false>(steps, x.dout + first * steps, steps, values, steps, Strips(KT / W), x.dp,
                                  KT);
    for (int r = 0; r < MR; r += 2) row_pair<DTYPE, LANES, DELTA>(x, first + r, r, g, c);
  }
}

template <int DTYPE>
struct Backward {
  static constexpr int MR = group_of<DTYPE>(), KTP = transposed_rows<DTYPE>();
  const FbBackward* call;
  const FbAttention* p;
  const Layout* layout;
  const BackwardPacked* packed;
  Scratch x;

  // Calls visit(tile, group, constants) for each tile that is not removed for the rows of the task.
  template <class Visit>
  void tiles(const RowTask& task, const Visit& visit) {
    alignas(64) float lane_add[KT], lane_weight[KT];
    const float scale = entry(p->scale, task.b, task.h, 0, 1.f);
    auto bias = [&](int64_t c) { return entry(p->bias, task.b, task.h, task.segment * p->C + c, 0.f); };
    auto weight = [&](int64_t c) { return entry(p->weight, task.b, task.h, task.segment * p->C + c, 1.f); };
    for (int64_t g = 0; g < p->G; ++g)
      for (int32_t n = layout->group_tiles[g]; n < layout->group_tiles[g + 1]; ++n) {
        const Tile& tile = layout->tiles[n];
        const Piece* pieces = layout->pieces + tile.first_piece;
        const int64_t first = pieces[0].segment;
        if (bias(first) == -kInf) continue;
        Constants c{scale, bias(first) * kLog2e, weight(first), nullptr, nullptr};
        if (tile.pieces > 1 || tile.count < KT) {
          for (int j = 0; j < KT; ++j) lane_add[j] = -kInf, lane_weight[j] = 0.f;
          for (int i = 0; i < tile.pieces; ++i)
            for (int j = pieces[i].lane; j < pieces[i].lane + pieces[i].count; ++j)
              lane_add[j] = bias(pieces[i].segment) * kLog2e, lane_weight[j] = weight(pieces[i].segment);
          c.lane_add = lane_add, c.lane_weight = lane_weight;
        }
        visit(n, g, c);
      }
  }

  // One block of rows: writes dq, adds to dk and dv.
  void block(const RowTask& task) {
    constexpr bool PAIRS = pairs<DTYPE>();
    constexpr int PER = per<DTYPE>();
    const int64_t b = task.b, h = task.h, D = p->D, DP = padded_dim(D), steps = dim_steps<DTYPE>(D);
    const int64_t item = p->source_q ? p->source_q[b] : b;
    pack_rows<DTYPE>(p, p->q, item, task, kRows, x.q);
    pack_rows<DTYPE>(p, call->dout, b, task, kRows, x.dout);
    pack_columns<DTYPE>(p, p->q, item, task, x.q_columns);
    pack_columns<DTYPE>(p, call->dout, b, task, x.dout_columns);
    memset(x.dq, 0, size_t(kRows * DP) * 4);
    const float gain = call->gains[(b * p->H + h) * p->R + task.segment];
    for (int64_t g = 0; g < p->G; ++g)
      for (int64_t i = 0; i < kRows; ++i) {
        const int64_t row = task.first + i, at = g * kRows + i;
        const bool real = i < task.count;
        const float lse = real ? p->lse[((b * p->H + h) * p->M + row) * p->G + g] : -kInf;
        // exp2(t - inf) = 0 for rows that have no key or do not exist.
        x.lse[at] = lse == -kInf ? kInf : lse * kLog2e;
        const float gate =
            real && p->gates.data ? p->gates.data[b * p->gates.stride_b + row * p->gates.stride_h + g] : 1.f;
        x.factor[at] = gain * gate;
        x.delta[at] = 0.f;
      }
    // delta = sum_j p dP. With one group and no contrast it is <o, dO>; with several it takes a sweep of its
    // own.
    if (p->G == 1) {
      for (int64_t i = 0; i < task.count; ++i) {
        const char *o = at(p->out, p->dtype, b, task.first + i, h),
                   *d_o = at(call->dout, p->dtype, b, task.first + i, h);
        float lanes[16] = {};
        for (int64_t d = 0; d < D; ++d) lanes[d % 16] += to_f32<DTYPE>(o, d) * to_f32<DTYPE>(d_o, d);
        for (int j = 0; j < 16; ++j) x.delta[i] += lanes[j];
      }
    } else {
      tiles(task, [&](int32_t n, int64_t g, const Constants& c) {
        const uint32_t *keys = (const uint32_t*)packed->keys + n * steps * KT,
                       *values = (const uint32_t*)packed->values + n * steps * KT;
        c.lane_add ? tile_rows<DTYPE, true, true>(p, x, g, c, keys, values)
                   : tile_rows<DTYPE, false, true>(p, x, g, c, keys, values);
      });
    }
    tiles(task, [&](int32_t n, int64_t g, const Constants& c) {
      const uint32_t *keys = (const uint32_t*)packed->keys + n * steps * KT,
                     *values = (const uint32_t*)packed->values + n * steps * KT;
      const uint32_t* key_rows = (const uint32_t*)packed->key_rows + n * (KT / PER) * DP;
      c.lane_add ? tile_rows<DTYPE, true, false>(p, x, g, c, keys, values)
                 : tile_rows<DTYPE, false, false>(p, x, g, c, keys, values);
      transpose<DTYPE>(x.prob_pairs, x.prob_t);
      transpose<DTYPE>(x.ds_pairs, x.ds_t);
      for (int64_t i = 0; i < kRows; i += MR)
        multiply_strips<PAIRS, true>(KT / PER, x.ds + i * (KT / PER), KT / PER, key_rows, KT / PER,
                                     Strips(int(DP / W)), x.dq + i * DP, DP);
      float *dk = packed->dk + n * KTP * DP, *dv = packed->dv + n * KTP * DP;
      constexpr int64_t depth = kRows / PER;
      for (int64_t j = 0; j < KTP; j += MR) {
        multiply_strips<PAIRS, true>(depth, x.prob_t + j * depth, depth, x.dout_columns, depth,
                                     Strips(int(DP / W)), dv + j * DP, DP);
        multiply_strips<PAIRS, true>(depth, x.ds_t + j * depth, depth, x.q_columns, depth,
                                     Strips(int(DP / W)), dk + j * DP, DP);
      }
    });
    for (int64_t i = 0; i < task.count; ++i)
      store_row<DTYPE>((char*)at(call->dq, p->dtype, b, task.first + i, h), x.dq + i * DP, D);
  }

  void run(const RowTask* blocks, int64_t count, int64_t b, int64_t kv) {
    const int64_t steps = dim_steps<DTYPE>(p->D), DP = padded_dim(p->D), per_kv = p->H / p->Hkv;
    for (int32_t n = 0; n < layout->n_tiles; ++n) {
      const Tile& tile = layout->tiles[n];
      const TileRows<KT> keys(p, layout, tile, p->k, p->source_k, b, kv),
          values(p, layout, tile, p->v, p->source_v, b, kv);
      pack_keys<DTYPE, KT>(p, keys.row, (uint32_t*)packed->keys + n * steps * KT);
      pack_keys<DTYPE, KT>(p, values.row, (uint32_t*)packed->values + n * steps * KT);
      pack_values<DTYPE>(p, keys, (uint32_t*)packed->key_rows + n * (KT / per<DTYPE>()) * DP);
    }
    memset(packed->dk, 0, size_t(layout->n_tiles * KTP * DP) * 4);
    memset(packed->dv, 0, size_t(layout->n_tiles * KTP * DP) * 4);
    memset(x.prob_t, 0, size_t(KTP * kRows / per<DTYPE>()) * 4);
    memset(x.ds_t, 0, size_t(KTP * kRows / per<DTYPE>()) * 4);
    for (int64_t h = kv * per_kv; h < (kv + 1) * per_kv; ++h)
      for (int64_t i = 0; i < count; ++i) {
        RowTask task = blocks[i];
        task.b = int32_t(b), task.h = int32_t(h);
        block(task);
      }
    for (int32_t n = 0; n < layout->n_tiles; ++n)
      for (int i = 0; i < layout->tiles[n].pieces; ++i) {
        const Piece& piece = layout->pieces[layout->tiles[n].first_piece + i];
        for (int32_t j = 0; j < piece.count; ++j) {
          const int64_t row = (n * KTP + piece.lane + j) * DP;
          memcpy((char*)at(call->dk[piece.tensor], FB_F32, b, piece.start + j, kv), packed->dk + row,
                 size_t(p->D) * 4);
          memcpy((char*)at(call->dv[piece.tensor], FB_F32, b, piece.start + j, kv), packed->dv + row,
                 size_t(p->D) * 4);
        }
      }
  }
};

template <int DTYPE>
void unit(const FbBackward* call, const Layout* layout, const RowTask* blocks, int64_t count, int64_t b,
          int64_t kv, const BackwardPacked* packed, char* scratch) {
  const AmxScope<pairs<DTYPE>()> amx;
  Backward<DTYPE> backward{call, &call->call, layout, packed, {}};
  backward.x.template assign<DTYPE>(&call->call, scratch);
  backward.run(blocks, count, b, kv);
}

template <int DTYPE>
BackwardSizes sizes(const FbAttention* p, int64_t tiles) {
  Scratch x;
  const size_t tile = size_t(dim_steps<DTYPE>(p->D)) * KT * 4,
               rows = size_t(KT / per<DTYPE>() * padded_dim(p->D)) * 4;
  return {size_t(tiles) * tile, size_t(tiles) * rows,
          size_t(tiles * transposed_rows<DTYPE>() * padded_dim(p->D)) * 4, x.assign<DTYPE>(p, nullptr),
          kRows};
}

}  // namespace

namespace flashbrush {
namespace FLASHBRUSH_ISA {

BackwardSizes backward_sizes(const FbAttention* p, int64_t tiles) {
#define FB_CALL(T) return sizes<T>(p, tiles)
  FB_BY_DTYPE(p->dtype, FB_CALL)
#undef FB_CALL
}

void backward_unit(const FbBackward* call, const Layout* layout, const RowTask* blocks, int64_t count,
                   int64_t b, int64_t kv, const BackwardPacked* packed, char* scratch) {
#define FB_CALL(T) return unit<T>(call, layout, blocks, count, b, kv, packed, scratch)
  FB_BY_DTYPE(call->call.dtype, FB_CALL)
#undef FB_CALL
}

}  // namespace FLASHBRUSH_ISA
}  // namespace flashbrush
