// The entry points of the library for Hopper GPUs: checks, tensor maps, the choice of a kernel, its launch.
#include <type_traits>
#include "attention_forward.cuh"

using namespace flashbrush;

namespace {

constexpr int kMostShared = 227 << 10;  // bytes of shared memory that a block can have

enum { kOk = 0, kOtherVersion = -1, kNotTaken = -2, kRefused = -3 };

bool map_tensor(TensorMap* map, const FbGpuTensor& t, const FbGpuAttention& call, int heads, int box_rows) {
  return make_map(map, call.dtype == FB_F16, t.data, t.tokens, heads, t.items, call.D, 2 * t.stride_t,
                  2 * t.stride_h, 2 * t.stride_b, box_rows);
}

template <typename K>
int start(const FbGpuAttention& call, Stream stream) {
  Parameters p{};
  p.call = call;
  p.count = call.B * call.H * call.row_blocks;
  if (p.count == 0) return kOk;
  p.shared_q = call.q.items == 1;
  if (!map_tensor(&p.q, call.q, call, call.H, K::ROWS)) return kRefused;
  for (int n = 0; n < call.L; ++n) {
    p.k[n] = p.v[n] = p.q;  // an empty tensor has no map; this one is never read
    if (call.k[n].tokens == 0) continue;
    if (!map_tensor(&p.k[n], call.k[n], call, call.Hkv, K::KEYS) ||
        !map_tensor(&p.v[n], call.v[n], call, call.Hkv, K::KEYS))
      return kRefused;
    p.shared_k |= uint32_t(call.k[n].items == 1) << n;
    p.shared_v |= uint32_t(call.v[n].items == 1) << n;
  }
  if (K::shared_bytes(call) > kMostShared) return kNotTaken;
  const int blocks = p.count < call.multiprocessors ? p.count : call.multiprocessors;
  return launch(attention_forward<K>, p, blocks, K::THREADS, K::shared_bytes(call), stream);
}

// Tuning: -D on the compiler's command line replaces a number. FLASHBRUSH_TRIAL_DIM then builds only the
// kernel of that head dim, bfloat16, with one softmax group.
#ifndef FLASHBRUSH_TRIAL_DIM
#define FLASHBRUSH_TRIAL_DIM 0
#endif
#ifndef FLASHBRUSH_KEYS_128
#define FLASHBRUSH_KEYS_128 128
#endif
#ifndef FLASHBRUSH_GROUPS_128
#define FLASHBRUSH_GROUPS_128 2
#endif
#ifndef FLASHBRUSH_POLYNOMIAL_128
#define FLASHBRUSH_POLYNOMIAL_128 0
#endif
#ifndef FLASHBRUSH_KEYS_64
#define FLASHBRUSH_KEYS_64 128
#endif
#ifndef FLASHBRUSH_GROUPS_64
#define FLASHBRUSH_GROUPS_64 3
#endif
#ifndef FLASHBRUSH_POLYNOMIAL_64
#define FLASHBRUSH_POLYNOMIAL_64 0
#endif

// Warp groups that compute. At head dim 128 three of them have no registers for the second accumulator that
// several softmax groups need.
constexpr int warp_groups(int dim, bool grouped) {
  return dim <= 64 ? FLASHBRUSH_GROUPS_64 : grouped ? 2 : FLASHBRUSH_GROUPS_128;
}

template <typename T, int DIM, int KEYS, bool GROUPED, int POLYNOMIAL>
int run(const FbGpuAttention& call, Stream stream) {
  if constexpr (FLASHBRUSH_TRIAL_DIM &&
                (FLASHBRUSH_TRIAL_DIM != DIM || GROUPED || !std::is_same_v<T, bfloat16>))
    return kNotTaken;
  else
    return start<Kernel<T, DIM, KEYS, warp_groups(DIM, GROUPED), GROUPED, POLYNOMIAL>>(call, stream);
}

// With several softmax groups, two accumulators leave registers for tiles of 64 keys. With one, tiles have
// 128 keys: segments of image tokens are often multiples of 128, and wider tiles would take the shared memory
// of the masses.
template <typename T>
int choose(const FbGpuAttention& call, Stream stream) {
  if (call.D % 8 || call.D > 128) return kNotTaken;
  if (call.D > 64)
    return call.G > 1 ? run<T, 128, 64, true, 0>(call, stream)
                      : run<T, 128, FLASHBRUSH_KEYS_128, false, FLASHBRUSH_POLYNOMIAL_128>(call, stream);
  return call.G > 1 ? run<T, 64, 64, true, 0>(call, stream)
                    : run<T, 64, FLASHBRUSH_KEYS_64, false, FLASHBRUSH_POLYNOMIAL_64>(call, stream);
}

}  // namespace

// Returns 0, a CUDA error (> 0), -1: built from another version, -2: no kernel for this call, or -3: the
// driver refused the layout of a tensor.
FLASHBRUSH_EXPORT int flashbrush_gpu_attention(const FbGpuAttention* call, void* stream) {
  if (call->abi != FLASHBRUSH_CUDA_ABI) return kOtherVersion;
  if (call->C > FB_MOST_SEGMENTS || call->G > FB_MOST_GROUPS || call->L > FB_MOST_SEGMENTS) return kNotTaken;
  if (call->dtype == FB_BF16) return choose<bfloat16>(*call, Stream(stream));
  if (call->dtype == FB_F16) return choose<float16>(*call, Stream(stream));
  return kNotTaken;
}

// The text of a CUDA error; null for other statuses.
FLASHBRUSH_EXPORT const char* flashbrush_gpu_error(int status) {
  return error_text(status);
}

// Rows of a block: 64 for each warp group that computes.
FLASHBRUSH_EXPORT int flashbrush_gpu_block_rows(int dim, int softmax_groups) {
  return kGroupRows * warp_groups(dim, softmax_groups > 1);
}
