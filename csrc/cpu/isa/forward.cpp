// The forward pass for one instruction set: the packing of K and V, and a block of query rows against all
// tiles.
//
// A block of rows keeps m, l and the output in a thread's scratch. For each tile of 128 keys it takes 6 rows
// at a time (16 with AMX) through Q K^T, exp2 and P V, while K and V of the tile stay in the core's caches.
#include "isa/scratch.h"
#include "isa/softmax.h"

namespace {

using namespace flashbrush;

constexpr int KT = kForwardKeys;

// Adds the values of a tile to the sums [C][padded D] of their segments.
template <int DTYPE>
void add_values(const FbAttention* p, const Layout* layout, const Tile& tile, const TileRows<KT>& rows,
                float* sums) {
  for (int n = 0; n < tile.pieces; ++n) {
    const Piece& piece = layout->pieces[tile.first_piece + n];
    add_piece<DTYPE>(piece, rows.row, p->D, sums + piece.segment * padded_dim(p->D));
  }
}

template <int DTYPE>
void pack(const FbAttention* p, const Layout* layout, int64_t b, int64_t kv, int64_t first, int64_t last,
          const Packed* to) {
  const int64_t steps = dim_steps<DTYPE>(p->D), DP = padded_dim(p->D);
  for (int64_t n = first; n < last; ++n) {
    const Tile& tile = layout->tiles[n];
    pack_keys<DTYPE, KT>(p, TileRows<KT>(p, layout, tile, p->k, p->source_k, b, kv).row,
                         (uint32_t*)to->keys + n * steps * KT);
    const TileRows<KT> values(p, layout, tile, p->v, p->source_v, b, kv);
    pack_values<DTYPE>(p, values, (uint32_t*)to->values + n * (KT / per<DTYPE>()) * DP);
    if (to->sums) add_values<DTYPE>(p, layout, tile, values, to->sums);
  }
}

// Scratch of a thread for a block of rows. MR: rows of one product.
struct Scratch {
  uint32_t* q;           // [rows][dim_steps], operand a
  float *o, *total;      // [rows][padded D]: P V of one softmax group; the sum over groups
  float* s;              // [MR][KT] logits
  uint32_t* prob;        // [MR][KT] probabilities, operand a
  float *m, *l, *lse;    // [rows], m and lse in log2 units
  float* lanes;          // [rows][W]: the part of l of the segment that is being summed; else zeros
  float *mass, *mass_m;  // [C][rows]: sum of P of a segment, and the m that it is relative to
  float* before;         // [rows][W + padded D]: finished sums, see RowSums; of float32 only
  bool keeps_before = false;

  // `rows` is a multiple of MR. Returns bytes.
  template <int DTYPE>
  size_t assign(const FbAttention* p, int64_t rows, char* base) {
    Arena arena{base};
    const int64_t DP = padded_dim(p->D);
    constexpr int MR = group_of<DTYPE>();
    arena.take(q, rows * dim_steps<DTYPE>(p->D));
    arena.take(o, rows * DP);
    arena.take(total, p->G > 1 ? rows * DP : 0);
    arena.take(s, MR * KT);
    arena.take(prob, MR * KT);
    arena.take(m, rows);
    arena.take(l, rows);
    arena.take(lse, rows);
    arena.take(lanes, rows * W);
    arena.take(mass, p->mass ? rows * p->C : 0);
    arena.take(mass_m, p->mass ? rows * p->C : 0);
    arena.take(before, DTYPE == FB_F32 ? rows * (W + DP) : 0);
    return arena.bytes;
  }

  template <int DTYPE>
  RowSums sums(int64_t i, int64_t DP) {
    float* row_before = DTYPE == FB_F32 && keeps_before ? before + i * (W + DP) : nullptr;
    return {m + i, l + i, lanes + i * W, o + i * DP, row_before};
  }
};

// A tile's packed keys and values.
struct Operands {
  const uint32_t *keys, *values;
  int32_t count;
};

// Logits x.s of rows first .. first + MR -> probabilities x.prob. Not inlined, so that its constants stay in
// registers.
template <int DTYPE, int MODE, bool LANES, int N>
__attribute__((noinline)) void softmax(Scratch& x, int64_t first, const Constants& c, int64_t DP) {
  for (int r = 0; r < group_of<DTYPE>(); ++r)
    softmax_row<DTYPE, MODE, LANES, N>(x.sums<DTYPE>(first + r, DP), x.s + r * KT,
                                       x.prob + r * (KT / per<DTYPE>()), c, DP);
}

// One tile for all rows of the block. N: vectors of keys.
template <int DTYPE, int MODE, bool LANES, int N>
void tile_rows(const FbAttention* p, Scratch& x, int64_t groups, const Constants& c, const Operands& tile) {
  constexpr bool PAIRS = pairs<DTYPE>();
  constexpr int PER = per<DTYPE>(), MR = group_of<DTYPE>();
  const int64_t steps = dim_steps<DTYPE>(p->D), DP = padded_dim(p->D);
  const Strips columns(N), dims(int(DP / W));
  for (int64_t first = 0; first < groups * MR; first += MR) {
    multiply_strips<PAIRS, false>(steps, x.q + first * steps, steps, tile.keys, steps, columns, x.s, KT);
    softmax<DTYPE, MODE, LANES, N>(x, first, c, DP);
    if constexpr (MODE != kSum)
      multiply_strips<PAIRS, true>((tile.count + PER - 1) / PER, x.prob, KT / PER, tile.values, KT / PER,
                                   dims, x.o + first * DP, DP);
  }
}

template <int DTYPE>
void run_tile(Mode mode, const FbAttention* p, Scratch& x, int64_t groups, const Constants& c,
              const Operands& tile, int32_t keys) {
  const bool lanes = c.lane_add != nullptr, half = keys <= KT / 2;
  switch (mode) {
#define FB_MODE(mode)                                                           \
  case mode:                                                                    \
    if (half)                                                                   \
      lanes ? tile_rows<DTYPE, mode, true, KT / W / 2>(p, x, groups, c, tile)   \
            : tile_rows<DTYPE, mode, false, KT / W / 2>(p, x, groups, c, tile); \
    else                                                                        \
      lanes ? tile_rows<DTYPE, mode, true, KT / W>(p, x, groups, c, tile)       \
            : tile_rows<DTYPE, mode, false, KT / W>(p, x, groups, c, tile);     \
    break
    FB_MODE(kFold);
    FB_MODE(kSum);
    FB_MODE(kPost);
    FB_MODE(kClip);
#undef FB_MODE
  }
}

// Sweeps a block of rows over the tiles of a softmax group.
template <int DTYPE>
struct Sweep {
  static constexpr int MR = group_of<DTYPE>();
  const FbAttention* p;
  const Layout* layout;
  const RowTask* task;
  const Packed* packed;
  Scratch& x;
  int64_t rows, groups;
  float scale;

  float bias(int64_t c) const { return bias_of(p, *task, c); }
  float weight(int64_t c) const { return weight_of(p, *task, c); }

  void clear() {
    for (int64_t i = 0; i < groups * MR; ++i) x.m[i] = -kInf, x.l[i] = 0.f;
    memset(x.o, 0, size_t(groups * MR * padded_dim(p->D)) * 4);
    clear_lanes();
  }

  void clear_lanes() { memset(x.lanes, 0, size_t(groups * MR * W) * 4); }

  // Adds lanes and o to `before`, and sets them to zero.
  void keep_sums() {
    const int64_t DP = padded_dim(p->D);
    for (int64_t i = 0; i < groups * MR; ++i) {
      const RowSums row = x.template sums<DTYPE>(i, DP);
      auto keep = [](float* before, float* now) {
        store(before, load(before) + load(now));
        store(now, splat(0.f));
      };
      keep(row.before, row.lanes);
      for (int64_t d = 0; d < DP; d += W) keep(row.before + W + d, row.o + d);
    }
  }

  void join_kept_lanes() {
    for (int64_t i = 0; i < groups * MR; ++i) {
      const RowSums row = x.template sums<DTYPE>(i, padded_dim(p->D));
      store(row.lanes, load(row.lanes) + load(row.before));
      store(row.before, splat(0.f));
    }
  }

  void join_kept_outputs() {
    const int64_t DP = padded_dim(p->D);
    for (int64_t i = 0; i < groups * MR; ++i) {
      const RowSums row = x.template sums<DTYPE>(i, DP);
      for (int64_t d = 0; d < DP; d += W) store(row.o + d, load(row.o + d) + load(row.before + W + d));
    }
  }

  // Ends a segment: adds its lanes to l, and keeps their sum as its mass, relative to the present m.
  void close(int64_t c, float unfold) {
    const int64_t all = groups * MR;
    if (x.keeps_before) join_kept_lanes();
    auto add = [&](int64_t i, float part) {
      x.l[i] += part;
      if (x.mass) x.mass[c * rows + i] = part, x.mass_m[c * rows + i] = x.m[i];
    };
    int64_t i = 0;
    for (; i + 4 <= all; i += 4) {
      const float* lanes = x.lanes + i * W;
      float parts[4];
      store_sums(parts, load(lanes), load(lanes + W), load(lanes + 2 * W), load(lanes + 3 * W));
      for (int n = 0; n < 4; ++n) add(i + n, parts[n] * unfold);
    }
    for (; i < all; ++i) add(i, sum(load(x.lanes + i * W)) * unfold);
    clear_lanes();
  }

  // sums_only: the first sweep of a clipped contrast. clip: its row of FbAttention.contrast in the second
  // sweep, else null; shift = (beta - 1) / Nk.
  void run(int64_t g, bool sums_only, const float* clip, float shift) {
    const int64_t steps = dim_steps<DTYPE>(p->D), DP = padded_dim(p->D);
    int64_t open = -1;  // the segment whose sum lanes holds
    float unfold = 1.f;
    alignas(64) float lane_add[KT], lane_post[KT];
    const int32_t first_tile = layout->group_tiles[g], last_tile = layout->group_tiles[g + 1];
    int32_t summed = 0;  // tiles in lanes and o
    // Rounding the output to 16 bits costs far more than a long running sum does.
    x.keeps_before = DTYPE == FB_F32 && last_tile - first_tile > kTilesInSum;
    if (x.keeps_before) memset(x.before, 0, size_t(groups * MR * (W + DP)) * 4);
    for (int32_t n = first_tile; n < last_tile; ++n) {
      const Tile& tile = layout->tiles[n];
      const Piece* pieces = layout->pieces + tile.first_piece;
      const Operands operands{(const uint32_t*)packed->keys + n * steps * KT,
                              (const uint32_t*)packed->values + n * (KT / per<DTYPE>()) * DP, tile.count};
      const int64_t c = pieces[0].segment;
      const bool mixed = tile.pieces > 1;
      if (open >= 0 && (mixed || open != c)) close(open, unfold), open = -1;
      // Removed segments never share a tile with others.
      if (bias(c) == -kInf) continue;
      Constants k{};
      k.scale = scale * kLog2e;
      if (clip) k.beta = clip[1], k.lo = clip[2], k.hi = clip[3], k.shift = shift;
      const TileUse use = use_tile(p, layout, tile, *task,
                                   sums_only ? kSum
                                   : clip    ? kClip
                                             : kFold,
                                   k, lane_add, lane_post);
      if (!use.computed) continue;
      if (x.keeps_before && summed == kTilesInSum) keep_sums(), summed = 0;
      ++summed;
      const Mode mode = use.mode;
      if (mode == kClip) {
        run_tile<DTYPE>(mode, p, x, groups, k, operands, tile.count);
        continue;
      }
      if (open < 0) unfold = use.unfold;
      if (mixed && x.mass && !clip) {
        run_mixed(mode, k, tile, pieces, operands);
      } else {
        run_tile<DTYPE>(mode, p, x, groups, k, operands, tile.count);
      }
      if (mixed) {
        close_mixed();
      } else {
        open = c;
      }
    }
    if (open >= 0) close(open, unfold);
    if (x.keeps_before) join_kept_outputs();
  }

  void close_mixed() {
    for (int64_t i = 0; i < groups * MR; ++i) x.l[i] += sum(load(x.lanes + i * W));
    clear_lanes();
  }

  // A tile of several segments whose masses are wanted: MR rows at a time, as x.s holds the probabilities of
  // the last ones.
  void run_mixed(Mode mode, const Constants& k, const Tile& tile, const Piece* pieces, Operands operands) {
    const int64_t steps = dim_steps<DTYPE>(p->D), DP = padded_dim(p->D);
    Scratch part = x;
    if (mode == kSum) operands.count = 0;
    for (int64_t first = 0; first < groups * MR; first += MR) {
      part.q = x.q + first * steps, part.o = x.o + first * DP, part.lanes = x.lanes + first * W;
      part.m = x.m + first, part.l = x.l + first, part.before = x.before + first * (W + DP);
      run_tile<DTYPE>(kPost, p, part, 1, k, operands, tile.count);
      for (int n = 0; n < tile.pieces; ++n)
        for (int r = 0; r < MR; ++r) {
          float mass = 0.f;
          for (int j = pieces[n].lane; j < pieces[n].lane + pieces[n].count; ++j) mass += x.s[r * KT + j];
          x.mass[pieces[n].segment * rows + first + r] = mass;
          x.mass_m[pieces[n].segment * rows + first + r] = x.m[first + r];
        }
    }
  }
};

// out, lse and masses of one block of rows.
template <int DTYPE>
void rows(const FbAttention* p, const Layout* layout, const RowTask* task, const Packed* packed,
          float* block_mass, char* scratch) {
  const int64_t b = task->b, h = task->h, D = p->D, DP = padded_dim(D), C = p->C;
  constexpr int MR = group_of<DTYPE>();
  const AmxScope<pairs<DTYPE>()> amx;
  const int64_t padded = round_up(task->count, MR);
  Scratch x;
  x.assign<DTYPE>(p, padded, scratch);
  if (!p->mass) x.mass = nullptr;
  pack_rows<DTYPE>(p, p->q, p->source_q ? p->source_q[b] : b, *task, padded, x.q);
  const float scale = entry(p->scale, b, h, 0, 1.f), gain = entry(p->gain, b, h, task->segment, 1.f);
  Sweep<DTYPE> sweep{p, layout, task, packed, x, padded, padded / MR, scale};
  float* total = p->G > 1 ? x.total : x.o;
  if (p->G > 1) memset(total, 0, size_t(padded * DP) * 4);
  if (x.mass)
    for (int64_t i = 0; i < C * padded; ++i) x.mass[i] = 0.f, x.mass_m[i] = 0.f;
  for (int64_t g = 0; g < p->G; ++g) {
    const float* contrast = p->contrast + g * 4;
    const bool clipped = contrast[0] == 2.f, linear = contrast[0] == 1.f;
    sweep.clear();
    sweep.run(g, clipped, nullptr, 0.f);
    if (p->lse || clipped)
      for (int64_t i = 0; i < task->count; ++i) {
        // In log2 units; -inf for a row without a key.
        x.lse[i] = x.l[i] == 0.f ? -kInf : x.m[i] + __builtin_log2f(x.l[i]);
        if (p->lse) p->lse[((b * p->H + h) * p->M + task->first + i) * p->G + g] = x.lse[i] * kLn2;
      }
    if (block_mass) {
      for (int64_t c = 0; c < C; ++c) {
        if (p->groups[c] != g) continue;
        const float *part = x.mass + c * padded, *m = x.mass_m + c * padded;
        float mass = 0.f;
        for (int64_t i = 0; i < task->count; ++i)
          if (part[i] != 0.f)
            mass += part[i] * (m[i] == x.m[i] ? 1.f : __builtin_exp2f(m[i] - x.m[i])) / x.l[i];
        block_mass[task->slot * C + c] = mass;
      }
    }
    float shift = 0.f, mean_factor = 0.f;
    if (clipped || linear) {
      const int64_t count = allowed_keys(p, layout, *task, g);
      shift = count ? (contrast[1] - 1.f) / float(count) : 0.f;
      mean_factor = -shift;
    }
    if (clipped) {
      memcpy(x.m, x.lse, size_t(task->count) * 4);
      for (int64_t i = 0; i < padded; ++i)
        if (i >= task->count || x.m[i] == -kInf) x.m[i] = 0.f;
      memset(x.o, 0, size_t(padded * DP) * 4);
      sweep.run(g, false, contrast, shift);
    }
    for (int64_t i = 0; i < task->count; ++i) {
      const int64_t row = task->first + i;
      const float gate =
          gain * (p->gates.data ? p->gates.data[b * p->gates.stride_b + row * p->gates.stride_h + g] : 1.f);
      const bool none = x.l[i] == 0.f;
      const float factor = none ? 0.f : gate * (clipped ? 1.f : linear ? contrast[1] / x.l[i] : 1.f / x.l[i]);
      float* o = x.o + i * DP;
      for (int64_t d = 0; d < DP; d += W) store(o + d, none ? splat(0.f) : load(o + d) * splat(factor));
      if (linear && !none)
        for (int64_t c = 0; c < C; ++c) {
          const float w = sweep.weight(c) * mean_factor * gate;
          if (p->groups[c] != g || sweep.bias(c) == -kInf || sweep.weight(c) == 0.f) continue;
          for (int64_t d = 0; d < DP; d += W)
            store(o + d, fma(splat(w), load(packed->sums + c * DP + d), load(o + d)));
        }
      if (p->G > 1)
        for (int64_t d = 0; d < DP; d += W) store(total + i * DP + d, load(total + i * DP + d) + load(o + d));
      if (g + 1 < p->G) continue;
      if (i + kAhead < task->count) fetch(at(p->out, p->dtype, b, row + kAhead, h), D * element_size(DTYPE));
      store_row<DTYPE>((char*)at(p->out, p->dtype, b, row, h), total + i * DP, D);
    }
  }
}

// One row of out, for each head times its factor.
template <int DTYPE>
void scale_row(const FbAttention* p, int64_t b, int64_t row, const float* factors) {
  const int64_t D = p->D, full = D / W * W, bytes = D * element_size(DTYPE);
  alignas(64) float x[256];
  for (int64_t h = 0; h < p->H; ++h) {
    char* to = (char*)at(p->out, DTYPE, b, row, h);
    // Another core wrote most of these lines. A prefetch for writing asks for their ownership with the first
    // request.
    const char* ahead = (const char*)at(p->out, DTYPE, b, row + 1 < p->M ? row + 1 : row, h);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(ahead + i, 1);
    if (factors[h] == 1.f) continue;
    const vf factor = splat(factors[h]);
    for (int64_t d = 0; d < full; d += W) store(x + d, load_vector<DTYPE>(to, d) * factor);
    if (full < D) store(x + full, load_part<DTYPE>(to, full, D - full) * factor);
    store_row<DTYPE>(to, x, D);
  }
}

}  // namespace

namespace flashbrush {
namespace FLASHBRUSH_ISA {

size_t key_tile_bytes(const FbAttention* p){
#define FB_CALL(T) return size_t(dim_steps<T>(p->D)) * KT * 4
    FB_BY_DTYPE(p -> dtype, FB_CALL)
#undef FB_CALL
}

size_t value_tile_bytes(const FbAttention* p){
#define FB_CALL(T) return size_t(KT / per<T>()) * size_t(padded_dim(p->D)) * 4
    FB_BY_DTYPE(p->dtype, FB_CALL)
#undef FB_CALL
}

size_t scratch_bytes(const FbAttention* p, int64_t block_rows) {
  Scratch x;
#define FB_CALL(T) return x.assign<T>(p, round_up(block_rows, group_of<T>()), nullptr)
  FB_BY_DTYPE(p->dtype, FB_CALL)
#undef FB_CALL
}

void pack(const FbAttention* p, const Layout* l, int64_t b, int64_t kv, int64_t first, int64_t last,
          const Packed* to) {
#define FB_CALL(T) return ::pack<T>(p, l, b, kv, first, last, to)
  FB_BY_DTYPE(p->dtype, FB_CALL)
#undef FB_CALL
}

void rows(const FbAttention* p, const Layout* l, const RowTask* t, const Packed* k, float* mass,
          char* scratch) {
#define FB_CALL(T) return ::rows<T>(p, l, t, k, mass, scratch)
  FB_BY_DTYPE(p->dtype, FB_CALL)
#undef FB_CALL
}

void scale_row(const FbAttention* p, int64_t b, int64_t row, const float* factors) {
#define FB_CALL(T) return ::scale_row<T>(p, b, row, factors)
  FB_BY_DTYPE(p->dtype, FB_CALL)
#undef FB_CALL
}

}  // namespace FLASHBRUSH_ISA
}  // namespace flashbrush
