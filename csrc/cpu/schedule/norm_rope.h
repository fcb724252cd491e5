// RMSNorm per head, an additive offset, and rotary embedding of several token streams into one buffer.
//
//   y = x / sqrt(mean(x^2) + eps) * weight        z = y + offset        out = z * cos + rotate(z) * sin
#pragma once
#include "attention.h"

extern "C" {

typedef struct {
  FbTensor x;           // (B, tokens, H, D)
  FbTensor offset;      // broadcast by strides of 0; data null: none
  const float* weight;  // [D]; null: none
  int64_t tokens;
  int32_t normalise;
} FbStream;

typedef struct {
  int32_t abi, dtype;
  int64_t B, T, H, D, streams;
  const FbStream* stream;      // [streams], joined in this order; T tokens in all
  FbTensor out;                // (B, T, H, D)
  const float *cos, *sin;      // [T][D], in the order of the joined streams; null: no rotation
  const int64_t* permutation;  // [T] or [B][T]: output token i is joined token permutation[i]; null: i
  int64_t permutation_stride;  // of an item; 0: all alike
  float eps;
  int32_t half;  // 0: pairs (2i, 2i + 1); 1: pairs (i, i + D/2)
  int32_t threads;
} FbNormRope;

// Gradients of the same call: of x and, summed over items and tokens, of the weight.
typedef struct {
  FbNormRope forward;  // out is the gradient of the output
  const FbTensor* dx;  // [streams]
  float* dweight;      // [streams][parts][D], a row for each part of the work, zeros before; null: not wanted
  int64_t parts;
} FbNormRopeBackward;
}
