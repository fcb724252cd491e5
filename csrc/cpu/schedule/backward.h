// Gradient of the attention with respect to q, k and v.
//
//   a_ij = gain * gate_g(i) * weight       dP_ij = a_ij <do_i, v_j>       delta_g(i) = sum_{j in g} p_ij
//   dP_ij dS = p (dP - delta_g)                  dq = scale dS k     dk = scale dS^T q      dv = sum_i a_ij
//   p_ij do_i
#pragma once
#include "attention.h"

extern "C" {

typedef struct {
  FbAttention call;  // as of the forward; out and lse are its results
  FbTensor dout;     // (B, M, H, D), dtype of the call
  FbTensor dq;       // (B, M, H, D), dtype of the call
  const FbTensor *dk,
      *dv;             // [L] (B, tokens, Hkv, D) float32, one for every output item; written, not added to
  const float* gains;  // [B][H][R], the gain that the forward applied
} FbBackward;
}
