// The gradient of attention with respect to q, k and v.
//
//   A_ij = gain * gate_g(i) * weight           dP_ij = A_ij * <do_i, v_j>
//   delta_g(i) = sum_{j in g} p_ij * dP_ij     dS_ij = p_ij * (dP_ij - delta_g(i))
//   dq = scale * dS k       dk = scale * dS^T q       dv_j = sum_i A_ij * p_ij * do_i
#pragma once
#include "attention.h"

extern "C" {

typedef struct {
  FbAttention call;  // the forward call; out and lse hold its results
  FbTensor dout;     // (B, M, H, D), dtype of the call
  FbTensor dq;       // (B, M, H, D), dtype of the call
  // [L] of (B, tokens, Hkv, D) float32, an item for each output item. Written, not added to; keys that do not
  // exist are left as they are.
  const FbTensor *dk, *dv;
  const float* gains;  // [B][H][R], the whole gain that the forward call applied
} FbBackward;
}
