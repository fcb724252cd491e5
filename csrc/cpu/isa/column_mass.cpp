// column_mass for one instruction set: mass_j = sum_i exp(s_ij + bias - lse_i).
//
// Keys and queries change places. A block of keys stands where attention has rows, a tile of queries where it
// has keys: the mass of a key is then the sum of a row, and bias - lse a constant of each lane.
#include "isa/pack.h"
#include "isa/scratch.h"

namespace {

using namespace flashbrush;

constexpr int KT = kForwardKeys;

// Scratch of a thread. MR: rows of one product.
struct Scratch {
  uint32_t* keys;     // [kColumnKeys][steps], operand a
  uint32_t* queries;  // [strip][step][query], operand b
  float* s;           // [MR][KT]
  float* sums;        // [kColumnKeys][W]: masses, lane by lane

  size_t assign(int64_t steps, int64_t MR, char* base) {
    Arena arena{base};
    arena.take(keys, kColumnKeys * steps);
    arena.take(queries, KT * steps);
    arena.take(s, MR * KT);
    arena.take(sums, kColumnKeys * W);
    return arena.bytes;
  }
};

template <int DTYPE>
void column_mass(const FbColumnMass* call, const ColumnTask* task, char* scratch) {
  constexpr bool PAIRS = pairs<DTYPE>();
  constexpr int MR = group_of<DTYPE>();
  const AmxScope<PAIRS> amx;
  const FbAttention* p = &call->call;
  const int64_t b = task->b, h = task->h, c = task->segment, steps = dim_steps<DTYPE>(p->D),
                per_kv = p->H / p->Hkv;
  const int64_t groups = round_up(task->count, MR) / MR, group = p->groups[c];
  Scratch x;
  x.assign(steps, MR, scratch);
  const RowTask keys{task->b, int32_t(h / per_kv), 0, 0, task->first, task->count};
  const int64_t key_item = p->source_k ? p->source_k[task->tensor * p->B + b] : b;
  pack_rows<DTYPE>(p, p->k[task->tensor], key_item, keys, groups * MR, x.keys);
  memset(x.sums, 0, size_t(groups * MR * W) * 4);
  const int64_t item = p->source_q ? p->source_q[b] : b;
  const int32_t* lengths = p->row_lengths + (p->rows_by_item ? b * p->R : 0);
  const float scale = entry(p->scale, b, h, 0, 1.f) * kLog2e;
  constexpr int DEGREE = DTYPE == FB_F32 ? 5 : 4;
  alignas(64) float add[KT];
  const char* rows[KT];
  int64_t start = 0;
  for (int64_t r = 0; r < p->R; start += lengths[r], ++r) {
    const float bias = entry(p->bias, b, h, r * p->C + c, 0.f);
    if (!call->counted[r] || bias == -kInf) continue;
    for (int64_t first = 0; first < lengths[r]; first += KT) {
      const int64_t count = lengths[r] - first < KT ? lengths[r] - first : KT;
      for (int64_t j = 0; j < KT; ++j) {
        const int64_t row = start + first + j;
        rows[j] = j < count ? at(p->q, p->dtype, item, row, h) : kZeros;
        const float lse = j < count ? p->lse[((b * p->H + h) * p->M + row) * p->G + group] : -kInf;
        // Lanes without a row, and rows without a key, add nothing.
        add[j] = lse == -kInf ? -kInf : (bias - lse) * kLog2e;
      }
      pack_keys<DTYPE, KT>(p, rows, x.queries);
      for (int64_t i = 0; i < groups * MR; i += MR) {
        multiply_strips<PAIRS, false>(steps, x.keys + i * steps, steps, x.queries, steps, Strips(KT / W), x.s,
                                      KT);
        for (int n = 0; n < MR; ++n) {
          vf total = splat(0.f);
#pragma GCC unroll 16
          for (int j = 0; j < KT; j += W)
            total = total + exp2<DEGREE>(fma(load(x.s + n * KT + j), splat(scale), load(add + j)));
          // One addition a tile, not one a vector: a running sum over all rows rounds as often.
          store(x.sums + (i + n) * W, load(x.sums + (i + n) * W) + total);
        }
      }
    }
  }
  float* to = call->mass + (b * p->H + h) * call->N + task->out;
  for (int64_t i = 0; i < task->count; ++i) to[i] = sum(load(x.sums + i * W));
}

}  // namespace

namespace flashbrush {
namespace FLASHBRUSH_ISA {

size_t column_mass_scratch(const FbAttention* p) {
  Scratch x;
#define FB_CALL(T) return x.assign(dim_steps<T>(p->D), group_of<T>(), nullptr)
  FB_BY_DTYPE(p->dtype, FB_CALL)
#undef FB_CALL
}

void column_mass_block(const FbColumnMass* call, const ColumnTask* task, char* scratch) {
#define FB_CALL(T) return ::column_mass<T>(call, task, scratch)
  FB_BY_DTYPE(call->call.dtype, FB_CALL)
#undef FB_CALL
}

}  // namespace FLASHBRUSH_ISA
}  // namespace flashbrush
