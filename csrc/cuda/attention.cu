// Checks, tensor maps and the choice of a kernel for the attention over segments on Hopper.
#include <type_traits>
#include "attention_forward.cuh"

using namespace flashbrush;

namespace {

constexpr int kMostShared = 227 << 10;  // bytes of a block

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
    p.k[n] = p.v[n] = p.q;  // there is no map of an empty tensor; nothing reads this one
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

// Another number in place of these can be tried from the command line. A trial wants the plain kernel of one
// head dim alone.
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

// Warp groups by head dim; three have no registers for the two accumulators of several softmax groups at head
// dim 128.
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

// Two accumulators leave room for tiles of 64 keys. The segments of a diptych are multiples of 128 tokens,
// and a mass wants the shared memory that a wider tile would take.
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

// 0, a CUDA error, or -1: built of another version, -2: no kernel for this call, -3: the driver refused a
// tensor's layout.
FLASHBRUSH_EXPORT int flashbrush_gpu_attention(const FbGpuAttention* call, void* stream) {
  if (call->abi != FLASHBRUSH_CUDA_ABI) return kOtherVersion;
  if (call->C > FB_MOST_SEGMENTS || call->G > FB_MOST_GROUPS || call->L > FB_MOST_SEGMENTS) return kNotTaken;
  if (call->dtype == FB_BF16) return choose<bfloat16>(*call, Stream(stream));
  if (call->dtype == FB_F16) return choose<float16>(*call, Stream(stream));
  return kNotTaken;
}

// What a status means; null: not CUDA's.
FLASHBRUSH_EXPORT const char* flashbrush_gpu_error(int status) {
  return error_text(status);
}

// Rows of a block, a multiple of 64, which are a warp group's.
FLASHBRUSH_EXPORT int flashbrush_gpu_block_rows(int dim, int softmax_groups) {
  return kGroupRows * warp_groups(dim, softmax_groups > 1);
}
