// How much attention each key receives: the sum over rows of p_ij = exp(s_ij + bias - lse_i), without the
// map.
#pragma once
#include "attention.h"

extern "C" {

typedef struct {
  FbAttention call;        // v, out, weight, gain, gates, contrast and mass are not read; lse is given
  const uint8_t* counted;  // [R]: the row segments that count
  float* mass;             // [B][H][N], zeros before; N keys of all tensors together
  int64_t N;
} FbColumnMass;
}
