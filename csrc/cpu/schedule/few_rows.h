// Attention of a few rows: keys and values are read where they lie, as packing them costs more than it saves.
#pragma once
#include "kernels.h"

namespace flashbrush {

constexpr int64_t kFewRows = 36;

// Whether the rows that share a key head are so few that its keys and values are not worth packing. kFewRows
// lies short of where the two paths cross with AVX2, which is earlier than with AVX-512. Pairs of bfloat16
// multiply twice as fast where the hardware has them, but only packed, which moves the crossing: 16 is by
// count of operations there, not measured.
inline bool has_few_rows(const FbAttention* p, const Kernels* kernels) {
  return p->M * (p->H / p->Hkv) <= (p->dtype == FB_BF16 && kernels->multiplies_pairs ? 16 : kFewRows);
}

// Writes out, lse and mass; p->mass holds zeros before.
int attend_few_rows(const FbAttention* p, const Kernels* kernels, FbParallel parallel);

}  // namespace flashbrush
