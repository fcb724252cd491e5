// Reading and writing rows of the three dtypes.
#pragma once
#include "attention.h"
#include "simd.h"

#define FB_BY_DTYPE(dtype, call) \
  switch (dtype) {               \
    case FB_F32: call(FB_F32);   \
    case FB_BF16: call(FB_BF16); \
    default: call(FB_F16);       \
  }

namespace {

inline int64_t element_size(int32_t dtype) { return dtype == FB_F32 ? 4 : 2; }

inline const char* at(const FbTensor& t, int32_t dtype, int64_t b, int64_t token, int64_t h) {
  return (const char*)t.data + (b * t.stride_b + token * t.stride_t + h * t.stride_h) * element_size(dtype);
}

template <int DTYPE>
inline float to_f32(const void* p, int64_t i) {
  if constexpr (DTYPE == FB_F32) return ((const float*)p)[i];
  if constexpr (DTYPE == FB_BF16) return bf16_to_f32(((const uint16_t*)p)[i]);
  return f16_to_f32(((const uint16_t*)p)[i]);
}

template <int DTYPE>
inline void load_row(const char* from, float* to, int64_t D) {
  for (int64_t d = 0; d < D; ++d) to[d] = to_f32<DTYPE>(from, d);
}

template <int DTYPE>
inline void store_row(char* to, const float* from, int64_t D) {
  if constexpr (DTYPE == FB_F32) {
    memcpy(to, from, size_t(D) * 4);
  } else {
    int64_t d = 0;
#if defined(__AVX512BF16__)
    if constexpr (DTYPE == FB_BF16)
      for (; d + 16 <= D; d += 16) _mm256_storeu_si256((__m256i*)(to + 2 * d), (__m256i)_mm512_cvtneps_pbh(load(from + d)));
#endif
    for (; d < D; ++d) ((uint16_t*)to)[d] = DTYPE == FB_BF16 ? f32_to_bf16(from[d]) : f32_to_f16(from[d]);
  }
}

}  // namespace
