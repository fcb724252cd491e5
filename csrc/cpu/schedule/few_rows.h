// Attention of few rows, which does not pack K and V: packing costs more there than it saves.
#pragma once
#include "kernels.h"

namespace flashbrush {

// Most rows that share a key head. A little below the number for which both paths take the same time with
// AVX2 (measured), which is lower than with AVX-512.
constexpr int64_t kFewRows = 36;
// The same for bfloat16 where the hardware multiplies pairs: only packed products do, twice as fast. By count
// of operations, not measured.
constexpr int64_t kFewRowsOfPairs = 16;

inline bool has_few_rows(const FbAttention* p, const Kernels* kernels) {
  return p->M * (p->H / p->Hkv) <=
         (p->dtype == FB_BF16 && kernels->multiplies_pairs ? kFewRowsOfPairs : kFewRows);
}

// Writes out and lse, adds to mass. Returns a Status.
int attend_few_rows(const FbAttention* p, const Kernels* kernels, FbParallel parallel);

}  // namespace flashbrush
