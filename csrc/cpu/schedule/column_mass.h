// How much attention each key receives: mass_j = sum over rows i of p_ij = exp(s_ij + bias - lse_i).
#pragma once
#include "attention.h"

extern "C" {

typedef struct {
  FbAttention call;        // lse is an input; v, out, weight, gain, gates, contrast and mass are not read
  const uint8_t* counted;  // [R]: 1 for the row segments that count
  float* mass;             // output [B][H][N], zeros before the call
  int64_t N;               // keys of all tensors
} FbColumnMass;
}
