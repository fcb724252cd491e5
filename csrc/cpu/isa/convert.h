// Rows of float32, bfloat16 or float16 in memory to and from float32 vectors.
#pragma once
#include "attention.h"
#include "isa/simd.h"

// call(FB_...) with the dtype as a constant; `call` returns or breaks.
#define FB_BY_DTYPE(dtype, call) \
  switch (dtype) {               \
    case FB_F32:                 \
      call(FB_F32);              \
    case FB_BF16:                \
      call(FB_BF16);             \
    default:                     \
      call(FB_F16);              \
  }

namespace {

inline int64_t element_size(int32_t dtype) {
  return dtype == FB_F32 ? 4 : 2;
}

// The row of dim elements of one token and head.
inline const char* at(const FbTensor& t, int32_t dtype, int64_t b, int64_t token, int64_t h) {
  return (const char*)t.data + (b * t.stride_b + token * t.stride_t + h * t.stride_h) * element_size(dtype);
}

template <int DTYPE>
inline float to_f32(const void* p, int64_t i) {
  if constexpr (DTYPE == FB_F32) return ((const float*)p)[i];
  if constexpr (DTYPE == FB_BF16) return bf16_to_f32(((const uint16_t*)p)[i]);
  return f16_to_f32(((const uint16_t*)p)[i]);
}

// Elements i .. i + W of a row.
template <int DTYPE>
inline vf load_vector(const char* row, int64_t i) {
  if constexpr (DTYPE == FB_F32) return load((const float*)row + i);
#if defined(__AVX512F__)
  const __m256i x = _mm256_loadu_si256((const __m256i*)(row + 2 * i));
  if constexpr (DTYPE == FB_BF16) return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  return _mm512_cvtph_ps(x);
#elif defined(__AVX2__)
  const __m128i x = _mm_loadu_si128((const __m128i*)(row + 2 * i));
  if constexpr (DTYPE == FB_BF16) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  return _mm256_cvtph_ps(x);
#else
  float lane[W];
  for (int j = 0; j < W; ++j) lane[j] = to_f32<DTYPE>(row, i + j);
  return load(lane);
#endif
}

// Elements i .. i + count, count < W, then zeros. Nothing beyond them is read.
template <int DTYPE>
inline vf load_part(const char* row, int64_t i, int64_t count) {
#if defined(__AVX512F__)
  const __mmask16 mask = __mmask16((1u << count) - 1);
  if constexpr (DTYPE == FB_F32) return _mm512_maskz_loadu_ps(mask, (const float*)row + i);
  const __m256i x = _mm256_maskz_loadu_epi16(mask, row + 2 * i);
  if constexpr (DTYPE == FB_BF16) return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  return _mm512_cvtph_ps(x);
#else
  float lane[W] = {};
  for (int64_t j = 0; j < count; ++j) lane[j] = to_f32<DTYPE>(row, i + j);
  return load(lane);
#endif
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
      for (; d + 16 <= D; d += 16)
        _mm256_storeu_si256((__m256i*)(to + 2 * d), (__m256i)_mm512_cvtneps_pbh(load(from + d)));
#endif
    for (; d < D; ++d) ((uint16_t*)to)[d] = DTYPE == FB_BF16 ? f32_to_bf16(from[d]) : f32_to_f16(from[d]);
  }
}

}  // namespace
