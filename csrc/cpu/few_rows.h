// Attention of a few rows: keys and values are read where they lie, as packing them costs more than it saves.
#pragma once
#include "kernels.h"

namespace flashbrush {

constexpr int64_t kFewRows = 24;

// Whether the rows that share a key head are so few that its keys and values are not worth packing. On AVX-512 (8 heads,
// 4096 keys, head dim 64 and 128, float32 and bfloat16) the unpacked path was 1.4 to 2.1 times as fast at 24 rows and
// 1.05 to 1.8 times at 36. Packed pairs of bfloat16 multiply twice as fast where the hardware has them, which moves the
// crossing: there 16 is by count of operations.
inline bool has_few_rows(const FbAttention* p) {
  return p->M * (p->H / p->Hkv) <= (p->dtype == FB_BF16 ? 16 : kFewRows);
}

// Writes out, lse and mass; p->mass holds zeros before.
int attend_few_rows(const FbAttention* p, const Kernels* kernels, FbParallel parallel);

}  // namespace flashbrush
