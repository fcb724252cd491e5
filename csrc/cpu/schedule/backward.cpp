// Spreads the backward pass over threads. A thread takes a whole (item, key head), so each sum has one owner
// and one order, and results are bitwise the same for any number of threads.
#include <string.h>

#include <atomic>

#include "schedule/backward.h"
#include "schedule/layout.h"

using namespace flashbrush;

namespace {

struct Job {
  const FbBackward* call;
  const Kernels* kernels;
  std::vector<ItemLayout> layouts;
  std::vector<std::vector<RowTask>> blocks;
  BackwardSizes sizes;
  size_t unit_bytes;
  Buffer buffers;  // [threads] of unit_bytes: packed operands, gradients, scratch
  std::atomic<int64_t> next{0}, next_thread{0};

  void work() {
    const FbAttention* p = &call->call;
    char* base = buffers.get() + next_thread.fetch_add(1) * unit_bytes;
    auto take = [&](size_t bytes) {
      char* from = base;
      base += round_up(int64_t(bytes), 64);
      return from;
    };
    const BackwardPacked packed{take(sizes.keys), take(sizes.keys), take(sizes.key_rows),
                                (float*)take(sizes.gradient), (float*)take(sizes.gradient)};
    char* scratch = take(sizes.scratch);
    for (int64_t i; (i = next.fetch_add(1)) < p->B * p->Hkv;) {
      const int64_t b = i / p->Hkv;
      const Layout layout = layouts[layouts.size() > 1 ? b : 0].view();
      const std::vector<RowTask>& list = blocks[blocks.size() > 1 ? b : 0];
      kernels->backward_unit(call, &layout, list.data(), int64_t(list.size()), b, i % p->Hkv, &packed,
                             scratch);
    }
  }
};

}  // namespace

FLASHBRUSH_EXPORT int flashbrush_backward(const FbBackward* call, const char* isa, FbParallel parallel) {
  const FbAttention* p = &call->call;
  if (p->abi != FLASHBRUSH_ABI) return kOtherVersion;
  Job job;
  job.call = call, job.kernels = find(isa);
  if (!job.kernels) return kNoIsa;
  std::vector<char> shareable(p->C);
  for (int64_t c = 0; c < p->C; ++c) shareable[c] = always_read(p, c);
  int64_t most = 0;
  for (int64_t b = 0; b < (p->keys_by_item || p->valid ? p->B : 1); ++b) {
    job.layouts.push_back(lay_out(p, b, kBackwardKeys, shareable));
    most = std::max<int64_t>(most, int64_t(job.layouts.back().tiles.size()));
  }
  job.sizes = job.kernels->backward_sizes(p, most);
  for (int64_t b = 0; b < (p->rows_by_item ? p->B : 1); ++b)
    job.blocks.push_back(cut_rows(p, b, job.sizes.block_rows, job.kernels->row_group));
  const int threads = int(std::max<int64_t>(1, std::min<int64_t>(p->threads, p->B * p->Hkv)));
  auto aligned = [](size_t bytes) { return size_t(round_up(int64_t(bytes), 64)); };
  job.unit_bytes = 2 * aligned(job.sizes.keys) + aligned(job.sizes.key_rows) +
                   2 * aligned(job.sizes.gradient) + aligned(job.sizes.scratch);
  if (!allocate(job.buffers, job.unit_bytes * size_t(threads))) return kNoMemory;
  run_parallel(parallel, [](void* data) { static_cast<Job*>(data)->work(); }, &job, threads);
  return kOk;
}
