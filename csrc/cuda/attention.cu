// Checks, tensor maps and the choice of a kernel for the attention over segments on Hopper.
#include "attention_forward.cuh"

using namespace flashbrush;

namespace {

enum { kOk = 0, kOtherVersion = -1, kNotTaken = -2, kRefused = -3 };

// Nothing reads an empty tensor, and there is no map of one.
bool map_tensor(TensorMap* map, const FbGpuTensor& t, const FbGpuAttention& call, int heads, int box_rows) {
  return t.tokens == 0 || make_map(map, call.dtype == FB_F16, t.data, t.tokens, heads, t.items, call.D, 2 * t.stride_t, 2 * t.stride_h, 2 * t.stride_b, box_rows);
}

template <typename K>
int run(const FbGpuAttention& call, Stream stream) {
  Parameters p{};
  p.call = call;
  p.count = call.B * call.H * call.row_blocks;
  if (p.count == 0) return kOk;
  p.shared_q = call.q.items == 1;
  if (!map_tensor(&p.q, call.q, call, call.H, kRows)) return kRefused;
  for (int n = 0; n < call.L; ++n) {
    if (!map_tensor(&p.k[n], call.k[n], call, call.Hkv, K::KEYS) || !map_tensor(&p.v[n], call.v[n], call, call.Hkv, K::KEYS)) return kRefused;
    p.shared_k |= uint32_t(call.k[n].items == 1) << n;
    p.shared_v |= uint32_t(call.v[n].items == 1) << n;
  }
  const int blocks = p.count < call.multiprocessors ? p.count : call.multiprocessors;
  return launch(attention_forward<K>, p, blocks, kThreads, K::shared_bytes(call), stream);
}

template <typename T>
int choose(const FbGpuAttention& call, Stream stream) {
  // Two accumulators leave room for a tile of 64 keys. Segments of a diptych are multiples of 128 tokens, and a mass wants
  // the shared memory that a wider tile would take.
  if (call.D == 128) return call.G > 1 ? run<Kernel<T, 128, 64, true, 0>>(call, stream) : run<Kernel<T, 128, 128, false, 0>>(call, stream);
  if (call.D == 64) return call.G > 1 ? run<Kernel<T, 64, 64, true, 0>>(call, stream) : run<Kernel<T, 64, 128, false, 0>>(call, stream);
  return kNotTaken;
}

}  // namespace

// 0, a CUDA error, or -1: built of another version, -2: no kernel for this call, -3: the driver refused a tensor's layout.
FLASHBRUSH_EXPORT int flashbrush_gpu_attention(const FbGpuAttention* call, void* stream) {
  if (call->abi != FLASHBRUSH_CUDA_ABI) return kOtherVersion;
  if (call->C > FB_MOST_SEGMENTS || call->G > FB_MOST_GROUPS || call->L > FB_MOST_SEGMENTS) return kNotTaken;
  if (call->dtype == FB_BF16) return choose<bfloat16>(*call, Stream(stream));
  if (call->dtype == FB_F16) return choose<float16>(*call, Stream(stream));
  return kNotTaken;
}

// What a status means; null: not CUDA's.
FLASHBRUSH_EXPORT const char* flashbrush_gpu_error(int status) { return error_text(status); }
