// qk_norm_rope for one instruction set. Each element is read and written once; arithmetic is in float32.
#include "schedule/norm_rope.h"
#include "isa/convert.h"
#include "kernels.h"

namespace {

using namespace flashbrush;

constexpr int64_t kMaxDim = 256;

// out = z * cos + rotate(z) * sin, where rotate(a, b) = (-b, a) for each pair. Pairs are (d, d + D/2) if
// half, else neighbours.
inline void rotate(const float* z, const float* cos, const float* sin, bool half, int64_t D, float* out) {
  if (half) {
    const int64_t n = D / 2;
    for (int64_t d = 0; d < n; ++d) {
      out[d] = z[d] * cos[d] - z[d + n] * sin[d];
      out[d + n] = z[d + n] * cos[d + n] + z[d] * sin[d + n];
    }
  } else {
    for (int64_t d = 0; d < D; d += 2) {
      out[d] = z[d] * cos[d] - z[d + 1] * sin[d];
      out[d + 1] = z[d + 1] * cos[d + 1] + z[d] * sin[d + 1];
    }
  }
}

// The transpose of rotate: dz from dout.
inline void rotate_back(const float* dout, const float* cos, const float* sin, bool half, int64_t D,
                        float* dz) {
  if (half) {
    const int64_t n = D / 2;
    for (int64_t d = 0; d < n; ++d) {
      dz[d] = dout[d] * cos[d] + dout[d + n] * sin[d + n];
      dz[d + n] = dout[d + n] * cos[d + n] - dout[d] * sin[d];
    }
  } else {
    for (int64_t d = 0; d < D; d += 2) {
      dz[d] = dout[d] * cos[d] + dout[d + 1] * sin[d + 1];
      dz[d + 1] = dout[d + 1] * cos[d + 1] - dout[d] * sin[d];
    }
  }
}

// 1 / sqrt(mean(x^2) + eps), summed in 16 lanes: the compiler keeps the order, so it cannot make lanes
// itself.
inline float inverse_rms(const float* x, int64_t D, float eps) {
  float lanes[16] = {};
  int64_t d = 0;
  for (; d + 16 <= D; d += 16)
    for (int i = 0; i < 16; ++i) lanes[i] += x[d + i] * x[d + i];
  for (int i = 0; d < D; ++d, ++i) lanes[i] += x[d] * x[d];
  float total = 0.f;
  for (int i = 0; i < 16; ++i) total += lanes[i];
  return 1.f / __builtin_sqrtf(total / float(D) + eps);
}

// Token i of the joined streams, all heads.
template <int DTYPE>
void forward_token(const FbNormRope* p, int64_t b, int64_t i) {
  const int64_t D = p->D, joined = p->permutation ? p->permutation[b * p->permutation_stride + i] : i;
  const FbStream* s = p->stream;
  int64_t token = joined;
  while (token >= s->tokens) token -= s->tokens, ++s;
  const float *cos = p->cos ? p->cos + joined * D : nullptr, *sin = p->cos ? p->sin + joined * D : nullptr;
  alignas(64) float z[kMaxDim], out[kMaxDim], offset[kMaxDim];
  for (int64_t h = 0; h < p->H; ++h) {
    load_row<DTYPE>(at(s->x, p->dtype, b, token, h), z, D);
    if (s->normalise) {
      const float r = inverse_rms(z, D, p->eps);
      if (s->weight)
        for (int64_t d = 0; d < D; ++d) z[d] *= r * s->weight[d];
      else
        for (int64_t d = 0; d < D; ++d) z[d] *= r;
    }
    if (s->offset.data) {
      load_row<DTYPE>(at(s->offset, p->dtype, b, token, h), offset, D);
      for (int64_t d = 0; d < D; ++d) z[d] += offset[d];
    }
    if (cos) rotate(z, cos, sin, p->half, D, out);
    store_row<DTYPE>((char*)at(p->out, p->dtype, b, i, h), cos ? out : z, D);
  }
}

// With r = 1 / rms and dy = dz * weight:  dx = r * (dy - x * <dy, x> * r^2 / D)      dweight += dz * x * r
template <int DTYPE>
void backward_token(const FbNormRopeBackward* q, int64_t b, int64_t i, int64_t part) {
  const FbNormRope* p = &q->forward;
  const int64_t D = p->D, joined = p->permutation ? p->permutation[b * p->permutation_stride + i] : i;
  int64_t n = 0, token = joined;
  while (token >= p->stream[n].tokens) token -= p->stream[n].tokens, ++n;
  const FbStream* s = p->stream + n;
  const float *cos = p->cos ? p->cos + joined * D : nullptr, *sin = p->cos ? p->sin + joined * D : nullptr;
  float* dweight = q->dweight && s->weight ? q->dweight + (n * q->parts + part) * D : nullptr;
  alignas(64) float dout[kMaxDim], dz[kMaxDim], x[kMaxDim];
  for (int64_t h = 0; h < p->H; ++h) {
    load_row<DTYPE>(at(p->out, p->dtype, b, i, h), dout, D);
    if (cos)
      rotate_back(dout, cos, sin, p->half, D, dz);
    else
      memcpy(dz, dout, size_t(D) * 4);
    if (s->normalise) {
      load_row<DTYPE>(at(s->x, p->dtype, b, token, h), x, D);
      const float r = inverse_rms(x, D, p->eps);
      if (dweight)
        for (int64_t d = 0; d < D; ++d) dweight[d] += dz[d] * x[d] * r;
      if (s->weight)
        for (int64_t d = 0; d < D; ++d) dz[d] *= s->weight[d];
      float dot = 0.f;
      for (int64_t d = 0; d < D; ++d) dot += dz[d] * x[d];
      const float back = dot * r * r / float(D);
      for (int64_t d = 0; d < D; ++d) dz[d] = r * (dz[d] - x[d] * back);
    }
    store_row<DTYPE>((char*)at(q->dx[n], p->dtype, b, token, h), dz, D);
  }
}

}  // namespace

namespace flashbrush {
namespace FLASHBRUSH_ISA {

void norm_rope_token(const FbNormRope* p, int64_t b, int64_t i) {
#define FB_CALL(T) return forward_token<T>(p, b, i)
  FB_BY_DTYPE(p->dtype, FB_CALL)
#undef FB_CALL
}

void norm_rope_backward_token(const FbNormRopeBackward* p, int64_t b, int64_t i, int64_t part) {
#define FB_CALL(T) return backward_token<T>(p, b, i, part)
  FB_BY_DTYPE(p->forward.dtype, FB_CALL)
#undef FB_CALL
}

}  // namespace FLASHBRUSH_ISA
}  // namespace flashbrush
