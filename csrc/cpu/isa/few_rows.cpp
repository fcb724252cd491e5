// The forward pass of few rows for one instruction set: K and V are read from their tensors and converted in
// registers, as packing them costs more than it saves.
//
// The rows are those of all query heads that share a key head. For each tile of keys, S = Q K^T takes four
// keys at a time and sums over lanes at the end; P V takes NV vectors of the head dim at a time. Both read a
// key or a value once for up to six rows. P is float32 in every dtype.
#include "schedule/few_rows.h"

#include <type_traits>

#include "isa/scratch.h"
#include "isa/softmax.h"

namespace {

using namespace flashbrush;

constexpr int KT = kForwardKeys;
constexpr int kTogether = kVectorRows;  // rows that share a read of a value

#if defined(__AVX512F__)
// Rows that share a read of a key: 6 x 4 accumulators, 4 vectors of keys and one of a row fill 29 of 32
// registers.
constexpr int kDotRows = 6;
#else
constexpr int kDotRows = 2;  // 2 x 4, 4 and 1: 13 of 16
#endif

// The results of a chunk of keys, relative to its own m.
struct Sums {
  float *m, *l;          // [G][rows], m in log2 units
  float* o;              // [G][rows][padded D]
  float *mass, *mass_m;  // [rows][C]: sum of P of a segment, and the m that it is relative to; null: none
  float* values;         // [C][padded D]: sum of a segment's values, for an unclipped contrast; null: none

  size_t assign(const FbAttention* p, char* base) {
    Arena arena{base};
    const int64_t rows = p->M * (p->H / p->Hkv), DP = padded_dim(p->D);
    bool linear = false;
    for (int64_t g = 0; g < p->G; ++g) linear |= p->contrast[g * 4] == 1.f;
    arena.take(m, p->G * rows);
    arena.take(l, p->G * rows);
    arena.take(o, p->G * rows * DP);
    arena.take(mass, p->mass ? rows * p->C : 0);
    arena.take(mass_m, p->mass ? rows * p->C : 0);
    arena.take(values, linear ? p->C * DP : 0);
    if (!p->mass) mass = nullptr;
    if (!linear) values = nullptr;
    return arena.bytes;
  }
};

// Scratch of a thread.
struct Scratch {
  float* q;         // [rows][padded D]
  float *s, *prob;  // [rows][KT]
  float* lanes;     // [W]

  size_t assign(const FbAttention* p, char* base) {
    Arena arena{base};
    const int64_t rows = p->M * (p->H / p->Hkv);
    arena.take(q, rows * padded_dim(p->D));
    arena.take(s, rows * KT);
    arena.take(prob, rows * KT);
    arena.take(lanes, W);
    return arena.bytes;
  }
};

// Keys or values to prefetch ahead: 4 KB of them, as hardware prefetchers rarely follow rows that lie apart.
inline int rows_ahead(int64_t row_bytes) {
  const int64_t rows = 4096 / row_bytes;
  return int(rows < 4 ? 4 : rows > 32 ? 32 : rows);
}

// s[r][j] = <q[r], key j> for j in 0 .. round_up(count, 4); keys beyond `count` are zeros.
template <int DTYPE, int R>
void dots(const float* const* q, const char* const* keys, int count, int64_t D, float* const* s) {
  const int64_t full = D / W * W, bytes = D * element_size(DTYPE);
  const int ahead = rows_ahead(bytes);
  for (int j = 0; j < count; j += 4) {
    for (int i = j + ahead; i < j + ahead + 4 && i < KT; ++i)
      for (int64_t x = 0; x < bytes; x += 64) __builtin_prefetch(keys[i] + x);
    vf acc[R][4];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[r][i] = splat(0.f);
    auto add = [&](int64_t d, const vf* key) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vf x = load(q[r] + d);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[r][i] = fma(x, key[i], acc[r][i]);
      }
    };
    vf key[4];
    for (int64_t d = 0; d < full; d += W) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) key[i] = load_vector<DTYPE>(keys[j + i], d);
      add(d, key);
    }
    if (full < D) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) key[i] = load_part<DTYPE>(keys[j + i], full, D - full);
      add(full, key);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store_sums(s[r] + j, acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
  }
}

// o[r][d .. d + N * W] += sum_j prob[r][j] * value_j[d ..]. With PART it is the last vector, of `part`
// elements.
template <int DTYPE, int R, int N, bool PART>
void weigh(const float* const* prob, const char* const* values, int count, int ahead, int64_t d, int64_t part,
           float* const* o) {
  vf acc[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[r][n] = splat(0.f);
  for (int j = 0; j < count; ++j) {
    if (j + ahead < KT)
      for (int64_t x = 0; x < N * W * element_size(DTYPE); x += 64)
        __builtin_prefetch(values[j + ahead] + d * element_size(DTYPE) + x);
    vf value[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      value[n] = PART ? load_part<DTYPE>(values[j], d, part) : load_vector<DTYPE>(values[j], d + n * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] = fma(splat(prob[r][j]), value[n], acc[r][n]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    // o gets one addition a tile, not one a key, see kTilesInSum.
    for (int n = 0; n < N; ++n) store(o[r] + d + n * W, load(o[r] + d + n * W) + acc[r][n]);
}

// Calls run(i, R) for rows i .. i + R until `count`, R being a constant of at most LIMIT.
template <int LIMIT, class Run>
inline void by_rows(int count, const Run& run) {
  for (int i = 0; i < count;) {
    switch (count - i < LIMIT ? count - i : LIMIT) {
#define FB_ROWS(n)                                                              \
  case n:                                                                       \
    if constexpr (n <= LIMIT) run(i, std::integral_constant<int, n>()), i += n; \
    break
      FB_ROWS(1);
      FB_ROWS(2);
      FB_ROWS(3);
      FB_ROWS(4);
      FB_ROWS(5);
      FB_ROWS(6);
#undef FB_ROWS
    }
  }
}

template <int DTYPE>
void all_dots(const float* const* q, const char* const* keys, int count, int64_t D, int rows,
              float* const* s) {
  by_rows<kDotRows>(rows, [&](int i, auto R) { dots<DTYPE, R.value>(q + i, keys, count, D, s + i); });
}

template <int DTYPE>
void all_weigh(const float* const* prob, const char* const* values, int count, int64_t D, int rows,
               float* const* o) {
  const int ahead = rows_ahead(D * element_size(DTYPE));
  by_rows<kTogether>(rows, [&](int i, auto R) {
    constexpr int n = R.value;
    int64_t d = 0;
    for (; d + NV * W <= D; d += NV * W)
      weigh<DTYPE, n, NV, false>(prob + i, values, count, ahead, d, 0, o + i);
    for (; d + W <= D; d += W) weigh<DTYPE, n, 1, false>(prob + i, values, count, ahead, d, 0, o + i);
    if (d < D) weigh<DTYPE, n, 1, true>(prob + i, values, count, ahead, d, D - d, o + i);
  });
}

// Logits s[KT] of one row -> probabilities prob[KT], in float32 whatever the dtype.
void softmax_tile(Mode mode, const RowSums& x, float* s, float* prob, const Constants& c, int32_t count,
                  int64_t DP) {
  const bool lanes = c.lane_add != nullptr, half = count <= KT / 2;
  uint32_t* to = (uint32_t*)prob;
  switch (mode) {
#define FB_MODE(mode)                                                        \
  case mode:                                                                 \
    if (half)                                                                \
      lanes ? softmax_row<FB_F32, mode, true, KT / W / 2>(x, s, to, c, DP)   \
            : softmax_row<FB_F32, mode, false, KT / W / 2>(x, s, to, c, DP); \
    else                                                                     \
      lanes ? softmax_row<FB_F32, mode, true, KT / W>(x, s, to, c, DP)       \
            : softmax_row<FB_F32, mode, false, KT / W>(x, s, to, c, DP);     \
    break
    FB_MODE(kFold);
    FB_MODE(kSum);
    FB_MODE(kPost);
    FB_MODE(kClip);
#undef FB_MODE
  }
}

template <int DTYPE>
struct Sweep {
  const FewRows* u;
  const FbAttention* p;
  Sums to;
  Scratch x;
  bool second;  // the sweep that applies a clipped contrast; m holds lse

  void add_mass(int64_t i, int64_t c, float part, float m) {
    float &mass = to.mass[i * p->C + c], &mass_m = to.mass_m[i * p->C + c];
    mass = part + (mass == 0.f ? 0.f : mass_m == m ? mass : mass * __builtin_exp2f(mass_m - m));
    mass_m = m;
  }

  void tile(int64_t g, const Tile& tile) {
    const int64_t D = p->D, DP = padded_dim(D), rows = u->rows;
    const Piece* pieces = u->layout->pieces + tile.first_piece;
    const float* contrast = p->contrast + g * 4;
    const bool clipped = contrast[0] == 2.f, mixed = tile.pieces > 1;
    alignas(64) float lane_add[KT], lane_post[KT];
    const float *q[kFewRows], *prob[kFewRows];
    float *s[kFewRows], *o[kFewRows];
    int seen = 0;  // rows for which the tile is not removed; removed segments never share a tile with others
    int64_t i = 0;
    for (int64_t n = 0; n < u->count; i += u->bands[n++].count)
      if (bias_of(p, u->bands[n], pieces[0].segment) != -kInf)
        for (int64_t r = i; r < i + u->bands[n].count; ++r) q[seen] = x.q + r * DP, s[seen++] = x.s + r * KT;
    if (!seen) return;
    const TileRows<KT> keys(p, u->layout, tile, p->k, p->source_k, u->b, u->kv);
    all_dots<DTYPE>(q, keys.row, tile.count, D, seen, s);
    // Lanes without a key: an infinite q times their zeros would be NaN.
    for (int r = 0; r < seen; ++r) memset(s[r] + tile.count, 0, size_t(KT - tile.count) * 4);
    int read = 0;  // rows that read the tile's values
    i = 0;
    for (int64_t n = 0; n < u->count; i += u->bands[n++].count) {
      const RowTask& band = u->bands[n];
      if (bias_of(p, band, pieces[0].segment) == -kInf) continue;
      Constants k{};
      k.scale = entry(p->scale, band.b, band.h, 0, 1.f) * kLog2e;
      if (second) k.beta = contrast[1], k.lo = contrast[2], k.hi = contrast[3], k.shift = shift(band, g);
      const TileUse use = use_tile(p, u->layout, tile, band,
                                   second    ? kClip
                                   : clipped ? kSum
                                             : kFold,
                                   k, lane_add, lane_post);
      if (!use.computed) continue;
      const bool pieces_apart = mixed && to.mass && !second;
      for (int64_t r = i; r < i + band.count; ++r) {
        float *own_s = x.s + r * KT, *own_prob = x.prob + r * KT;
        const RowSums row{to.m + g * rows + r, to.l + g * rows + r, x.lanes, to.o + (g * rows + r) * DP,
                          nullptr};
        store(x.lanes, splat(0.f));
        // A row without a key has lse = -inf, of which exp2 would make NaN. Its output is 0.
        if (second && *row.m == -kInf) continue;
        softmax_tile(pieces_apart ? kPost : use.mode, row, own_s, own_prob, k, tile.count, DP);
        if (use.mode != kSum) prob[read] = own_prob, o[read++] = row.o;
        if (second) continue;
        const float part = sum(load(x.lanes)) * use.unfold;
        *row.l += part;
        if (!to.mass) continue;
        if (!mixed) add_mass(r, pieces[0].segment, part, *row.m);
        for (int y = 0; mixed && y < tile.pieces; ++y) {
          float mass = 0.f;
          for (int j = pieces[y].lane; j < pieces[y].lane + pieces[y].count; ++j) mass += own_s[j];
          add_mass(r, pieces[y].segment, mass, *row.m);
        }
      }
    }
    if (!read && !(to.values && contrast[0] == 1.f)) return;
    const TileRows<KT> values(p, u->layout, tile, p->v, p->source_v, u->b, u->kv);
    if (read) all_weigh<DTYPE>(prob, values.row, tile.count, D, read, o);
    if (to.values && contrast[0] == 1.f && !second)
      for (int n = 0; n < tile.pieces; ++n) add_values(pieces[n], values);
  }

  // Only if a row sees the segment with a weight other than 0: nothing else may read these values.
  void add_values(const Piece& piece, const TileRows<KT>& values) {
    bool read = false;
    for (int64_t n = 0; n < u->count; ++n)
      read |=
          bias_of(p, u->bands[n], piece.segment) != -kInf && weight_of(p, u->bands[n], piece.segment) != 0.f;
    if (read) add_piece<DTYPE>(piece, values.row, p->D, to.values + piece.segment * padded_dim(p->D));
  }

  float shift(const RowTask& band, int64_t g) const {
    const int64_t count = allowed_keys(p, u->layout, band, g);
    return count ? (p->contrast[g * 4 + 1] - 1.f) / float(count) : 0.f;
  }

  void run(int32_t first, int32_t last) {
    const int64_t DP = padded_dim(p->D), rows = u->rows, item = p->source_q ? p->source_q[u->b] : u->b;
    int64_t i = 0;
    for (int64_t n = 0; n < u->count; ++n)
      for (int64_t r = 0; r < u->bands[n].count; ++r, ++i) {
        load_row<DTYPE>(at(p->q, p->dtype, item, u->bands[n].first + r, u->bands[n].h), x.q + i * DP, p->D);
        for (int64_t d = p->D; d < DP; ++d) x.q[i * DP + d] = 0.f;
      }
    if (!second) {
      for (int64_t r = 0; r < p->G * rows; ++r) to.m[r] = -kInf, to.l[r] = 0.f;
      memset(to.o, 0, size_t(p->G * rows * DP) * 4);
      if (to.mass) memset(to.mass, 0, size_t(rows * p->C) * 4);
      if (to.values) memset(to.values, 0, size_t(p->C * DP) * 4);
    }
    const Layout* layout = u->layout;
    for (int64_t g = 0; g < p->G; ++g) {
      if (second && p->contrast[g * 4] != 2.f) continue;
      const int32_t begin = layout->group_tiles[g], end = layout->group_tiles[g + 1];
      for (int32_t n = begin > first ? begin : first; n < (end < last ? end : last); ++n)
        tile(g, layout->tiles[n]);
    }
  }
};

inline Sums chunk_sums(const FewRows* u, int64_t chunk) {
  Sums sums;
  sums.assign(u->call, u->sums + chunk * int64_t(u->chunk_bytes));
  return sums;
}

}  // namespace

namespace flashbrush {
namespace FLASHBRUSH_ISA {

size_t few_rows_sums(const FbAttention* p) {
  return Sums().assign(p, nullptr);
}
size_t few_rows_scratch(const FbAttention* p) {
  return Scratch().assign(p, nullptr);
}

void few_rows_sweep(const FewRows* u, int64_t chunk, int32_t first, int32_t last, bool second,
                    char* scratch) {
#define FB_CALL(T)                                                \
  {                                                               \
    Sweep<T> sweep{u, u->call, chunk_sums(u, chunk), {}, second}; \
    sweep.x.assign(u->call, scratch);                             \
    return sweep.run(first, last);                                \
  }
  FB_BY_DTYPE(u->call->dtype, FB_CALL)
#undef FB_CALL
}

// Adds the chunks' results to those of chunk 0, in order. m of chunk 0 becomes lse in log2 units; with a
// clipped contrast so does m of every chunk, for the second sweep.
void few_rows_merge(const FewRows* u) {
  const FbAttention* p = u->call;
  const int64_t DP = padded_dim(p->D), rows = u->rows, C = p->C;
  const Sums to = chunk_sums(u, 0);
  // The factor from sums relative to m to sums relative to top.
  auto relative = [](float m, float top) { return m == top ? 1.f : __builtin_exp2f(m - top); };
  int64_t i = 0;
  for (int64_t n = 0; n < u->count; ++n)
    for (int64_t r = 0; r < u->bands[n].count; ++r, ++i)
      for (int64_t g = 0; g < p->G; ++g) {
        const RowTask& band = u->bands[n];
        const int64_t at = g * rows + i;
        float top = -kInf, l = 0.f;
        for (int64_t chunk = 0; chunk < u->chunks; ++chunk) {
          const float m = chunk_sums(u, chunk).m[at];
          top = m > top ? m : top;
        }
        for (int64_t chunk = 0; chunk < u->chunks; ++chunk) {
          const Sums from = chunk_sums(u, chunk);
          const float factor = relative(from.m[at], top);
          l += from.l[at] * factor;
          if (chunk == 0 && factor == 1.f) continue;
          float *o = to.o + at * DP, *more = from.o + at * DP;
          for (int64_t d = 0; d < DP; d += W)
            store(o + d,
                  chunk == 0 ? load(o + d) * splat(factor) : fma(load(more + d), splat(factor), load(o + d)));
        }
        // In log2 units; -inf for a row without a key.
        const float lse = l == 0.f ? -kInf : top + __builtin_log2f(l);
        if (p->lse) p->lse[((u->b * p->H + band.h) * p->M + band.first + r) * p->G + g] = lse * kLn2;
        for (int64_t c = 0; to.mass && c < C; ++c) {
          if (p->groups[c] != g) continue;
          float mass = 0.f;
          for (int64_t chunk = 0; chunk < u->chunks; ++chunk) {
            const Sums from = chunk_sums(u, chunk);
            if (from.mass[i * C + c] != 0.f)
              mass += from.mass[i * C + c] * relative(from.mass_m[i * C + c], top) / l;
          }
          p->mass[((u->b * p->H + band.h) * p->R + band.segment) * C + c] += mass;
        }
        to.l[at] = l;
        if (p->contrast[g * 4] == 2.f) {
          for (int64_t chunk = 0; chunk < u->chunks; ++chunk) chunk_sums(u, chunk).m[at] = lse;
        } else {
          to.m[at] = lse;
        }
      }
  for (int64_t chunk = 1; to.values && chunk < u->chunks; ++chunk)
    for (int64_t d = 0; d < C * DP; ++d) to.values[d] += chunk_sums(u, chunk).values[d];
}

// Adds the softmax groups and writes the rows to out.
void few_rows_finish(const FewRows* u) {
  const FbAttention* p = u->call;
  const int64_t DP = padded_dim(p->D), rows = u->rows;
  const Sums sums = chunk_sums(u, 0);
  int64_t i = 0;
  for (int64_t n = 0; n < u->count; ++n)
    for (int64_t r = 0; r < u->bands[n].count; ++r, ++i) {
      const RowTask& band = u->bands[n];
      const int64_t row = band.first + r;
      const float gain = entry(p->gain, band.b, band.h, band.segment, 1.f);
      alignas(64) float total[256] = {};
      for (int64_t g = 0; g < p->G; ++g) {
        const int64_t at = g * rows + i;
        if (sums.m[at] == -kInf) continue;
        const float* contrast = p->contrast + g * 4;
        const bool clipped = contrast[0] == 2.f, linear = contrast[0] == 1.f;
        const float gate =
            p->gates.data ? p->gates.data[u->b * p->gates.stride_b + row * p->gates.stride_h + g] : 1.f;
        const float factor = gain * gate * (clipped ? 1.f : (linear ? contrast[1] : 1.f) / sums.l[at]);
        for (int64_t chunk = 0; chunk < (clipped ? u->chunks : 1); ++chunk) {
          const float* o = chunk_sums(u, chunk).o + at * DP;
          for (int64_t d = 0; d < DP; d += W)
            store(total + d, fma(splat(factor), load(o + d), load(total + d)));
        }
        if (!linear) continue;
        const float mean = gain * gate * (1.f - contrast[1]) / float(allowed_keys(p, u->layout, band, g));
        for (int64_t c = 0; c < p->C; ++c) {
          const float w = weight_of(p, band, c) * mean;
          if (p->groups[c] != g || bias_of(p, band, c) == -kInf || weight_of(p, band, c) == 0.f) continue;
          for (int64_t d = 0; d < DP; d += W)
            store(total + d, fma(splat(w), load(sums.values + c * DP + d), load(total + d)));
        }
      }
      char* to = (char*)at(p->out, p->dtype, u->b, row, band.h);
#define FB_CALL(T)                 \
  {                                \
    store_row<T>(to, total, p->D); \
    break;                         \
  }
      FB_BY_DTYPE(p->dtype, FB_CALL)
#undef FB_CALL
    }
}

}  // namespace FLASHBRUSH_ISA
}  // namespace flashbrush
