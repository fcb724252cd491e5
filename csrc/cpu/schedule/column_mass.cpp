// Spreads column_mass over threads. A thread takes a block of keys of one head, so each sum has one owner and
// one order, and results are bitwise the same for any number of threads.
#include <algorithm>
#include <atomic>

#include "schedule/dispatch.h"

using namespace flashbrush;

namespace {

struct Job {
  const FbColumnMass* call;
  const Kernels* kernels;
  std::vector<ColumnTask> tasks;
  Buffer scratch;
  size_t scratch_size;
  std::atomic<int64_t> next{0}, next_thread{0};

  void work() {
    char* mine = scratch.get() + next_thread.fetch_add(1) * scratch_size;
    for (int64_t i; (i = next.fetch_add(1)) < int64_t(tasks.size());)
      kernels->column_mass_block(call, &tasks[i], mine);
  }
};

}  // namespace

FLASHBRUSH_EXPORT int flashbrush_column_mass(const FbColumnMass* call, const char* isa, FbParallel parallel) {
  const FbAttention* p = &call->call;
  if (p->abi != FLASHBRUSH_ABI) return kOtherVersion;
  Job job;
  job.call = call, job.kernels = find(isa);
  if (!job.kernels) return kNoIsa;
  for (int64_t b = 0; b < p->B; ++b) {
    const int32_t* lengths = p->key_lengths + (p->keys_by_item ? b * p->C : 0);
    for (int64_t h = 0; h < p->H; ++h) {
      int64_t start = 0;
      for (int64_t c = 0; c < p->C; start += lengths[c], ++c) {
        int64_t length = lengths[c];
        if (p->valid) length = std::max<int64_t>(0, std::min<int64_t>(length, p->valid[b * p->C + c]));
        for (int64_t first = 0; first < length; first += kColumnKeys)
          job.tasks.push_back({int32_t(b), int32_t(h), int32_t(c), int32_t(p->L == 1 ? 0 : c),
                               (p->L == 1 ? start : 0) + first, start + first,
                               std::min<int64_t>(kColumnKeys, length - first)});
      }
    }
  }
  const int threads = int(std::max<int64_t>(1, std::min<int64_t>(p->threads, int64_t(job.tasks.size()))));
  job.scratch_size = size_t(round_up(int64_t(job.kernels->column_mass_scratch(p)), 4096));
  if (!allocate(job.scratch, job.scratch_size * size_t(threads))) return kNoMemory;
  run_parallel(parallel, [](void* data) { static_cast<Job*>(data)->work(); }, &job, threads);
  return kOk;
}
