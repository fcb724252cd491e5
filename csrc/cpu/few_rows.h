// Attention of a few rows: keys and values are read where they lie, as packing them costs more than it saves.
#pragma once
#include "kernels.h"

namespace flashbrush {

constexpr int64_t kFewRows = 24;

// Whether the rows that share a key head are so few that its keys and values are not worth packing. With AVX-512, 8 heads,
// 4096 keys, head dims 64 and 128, float32 and bfloat16, the unpacked path took 0.5 to 0.7 of the time at 24 rows and 0.6
// to 0.95 at 36. Pairs of bfloat16 multiply twice as fast where the hardware has them, but only packed, which moves the
// crossing: 16 is by count of operations there, not measured.
inline bool has_few_rows(const FbAttention* p, const Kernels* kernels) {
  return p->M * (p->H / p->Hkv) <= (p->dtype == FB_BF16 && kernels->multiplies_pairs ? 16 : kFewRows);
}

// Writes out, lse and mass; p->mass holds zeros before.
int attend_few_rows(const FbAttention* p, const Kernels* kernels, FbParallel parallel);

}  // namespace flashbrush
