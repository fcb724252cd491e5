// Spreads qk_norm_rope and its gradient over threads, a run of tokens at a time.
#include <atomic>

#include "schedule/dispatch.h"

using namespace flashbrush;

namespace {

constexpr int64_t kTokens = 32;  // of a run in the forward pass

struct Job {
  const FbNormRope* forward;
  const FbNormRopeBackward* backward;
  const Kernels* kernels;
  std::atomic<int64_t> next{0};

  // The gradient has `parts` runs, each with its own row of dweight: results are bitwise the same for any
  // number of threads.
  void work() {
    const int64_t total = forward->B * forward->T,
                  size = backward ? (total + backward->parts - 1) / backward->parts : kTokens;
    for (int64_t part; (part = next.fetch_add(1)) * size < total;)
      for (int64_t i = part * size; i < total && i < (part + 1) * size; ++i) {
        const int64_t b = i / forward->T, token = i % forward->T;
        if (backward)
          kernels->norm_rope_backward_token(backward, b, token, part);
        else
          kernels->norm_rope_token(forward, b, token);
      }
  }
};

int run(const FbNormRope* forward, const FbNormRopeBackward* backward, const char* isa, FbParallel parallel) {
  if (forward->abi != FLASHBRUSH_ABI) return kOtherVersion;
  Job job{forward, backward, find(isa), {}};
  if (!job.kernels) return kNoIsa;
  const bool small = forward->B * forward->T * forward->H * forward->D < 32768;
  run_parallel(
      parallel, [](void* data) { static_cast<Job*>(data)->work(); }, &job, small ? 1 : forward->threads);
  return kOk;
}

}  // namespace

FLASHBRUSH_EXPORT int flashbrush_norm_rope(const FbNormRope* p, const char* isa, FbParallel parallel) {
  return run(p, nullptr, isa, parallel);
}

FLASHBRUSH_EXPORT int flashbrush_norm_rope_backward(const FbNormRopeBackward* p, const char* isa,
                                                    FbParallel parallel) {
  return run(&p->forward, p, isa, parallel);
}
