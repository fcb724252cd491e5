// RMSNorm of each head, an additive offset and rotary embedding, of several streams of tokens into one
// tensor.
//
//   y = x / sqrt(mean(x^2) + eps) * weight     z = y + offset     out = z * cos + rotate(z) * sin
//
// rotate(a, b) = (-b, a) for each pair of dimensions.
#pragma once
#include "attention.h"

extern "C" {

typedef struct {
  FbTensor x;           // (B, tokens, H, D)
  FbTensor offset;      // data null: none
  const float* weight;  // [D]; null: none
  int64_t tokens;
  int32_t normalise;  // 0: y = x
} FbStream;

typedef struct {
  int32_t abi, dtype;
  int64_t B, T, H, D, streams;
  const FbStream* stream;      // [streams], joined in this order to T tokens
  FbTensor out;                // (B, T, H, D)
  const float *cos, *sin;      // [T][D] for the tokens of the joined streams; null: no rotation
  const int64_t* permutation;  // [T] or [B][T]: output token i is joined token permutation[i]; null: i
  int64_t permutation_stride;  // T, or 0: one permutation for all items
  float eps;
  int32_t half;  // 0: pairs (2i, 2i + 1); 1: pairs (i, i + D / 2)
  int32_t threads;
} FbNormRope;

// Gradients of that call: of x, and of the weight summed over items and tokens.
typedef struct {
  FbNormRope forward;  // out holds the gradient of the output
  const FbTensor* dx;  // output [streams]
  float* dweight;      // output [streams][parts][D] to be summed over parts, zeros before; null: not wanted
  int64_t parts;       // runs of tokens, each added to one row by one thread
} FbNormRopeBackward;
}
