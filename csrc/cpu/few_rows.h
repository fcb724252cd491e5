// Attention of a few rows: keys and values are read where they lie, as packing them costs more than it saves.
#pragma once
#include "kernels.h"

namespace flashbrush {

constexpr int64_t kFewRows = 36;

// Whether the rows that share a key head are so few that its keys and values are not worth packing. At 8 heads, 4096 keys,
// head dims 64 and 128, float32 and bfloat16, the unpacked path took with AVX-512 0.45 to 0.65 of the time at 24 rows and
// 0.65 to 0.8 at 48, with AVX2 0.7 to 0.85 and 0.9 to 1.15. Pairs of bfloat16 multiply twice as fast where the hardware
// has them, but only packed, which moves the crossing: 16 is by count of operations there, not measured.
inline bool has_few_rows(const FbAttention* p, const Kernels* kernels) {
  return p->M * (p->H / p->Hkv) <= (p->dtype == FB_BF16 && kernels->multiplies_pairs ? 16 : kFewRows);
}

// Writes out, lse and mass; p->mass holds zeros before.
int attend_few_rows(const FbAttention* p, const Kernels* kernels, FbParallel parallel);

}  // namespace flashbrush
