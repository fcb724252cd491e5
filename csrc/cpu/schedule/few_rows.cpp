// Spreads the attention of few rows over threads. The keys of each (item, key head) are cut into chunks; the
// thread that ends a head's last chunk merges the chunks' results in their order. Chunks depend on the call
// alone, so results are bitwise the same for any number of threads.
//
// A clipped contrast needs the final lse: chunks are swept twice, and a second sweep waits until the first
// ones of its head are merged. Threads take tasks in one order in which every task waits for earlier ones
// only.
#include "schedule/few_rows.h"

#include <sched.h>

#include <atomic>

#include "schedule/layout.h"

using namespace flashbrush;

namespace {

// Chunks of a key head: about kTasks in all for many threads, of at least kTiles tiles so that starting one
// costs little, and of at most kTilesInSum tiles so that running sums stay short.
int64_t key_chunks(int64_t units, int64_t tiles) {
  constexpr int64_t kTasks = 64, kTiles = 4;
  const int64_t for_threads = std::min((kTasks + units - 1) / std::max<int64_t>(units, 1), tiles / kTiles);
  return std::max<int64_t>({1, for_threads, (tiles + kTilesInSum - 1) / kTilesInSum});
}

struct Job {
  const FbAttention* p;
  const Kernels* kernels;
  std::vector<ItemLayout> layouts;             // one, or one an item
  std::vector<std::vector<RowTask>> segments;  // row segments of an item that have rows: one, or one an item
  int64_t units, chunks, sweeps;
  size_t chunk_bytes, scratch_size;
  Buffer sums, scratch;
  std::unique_ptr<std::atomic<int64_t>[]> left;  // [units][sweeps] chunks
  std::unique_ptr<std::atomic<bool>[]> merged;   // [units]
  std::atomic<int64_t> next{0}, next_thread{0};

  void wait(int64_t unit) const {
    for (int spins = 0; !merged[unit].load(std::memory_order_acquire); ++spins)
      if (spins > 200) sched_yield();
  }

  void work() {
    char* mine = scratch.get() + next_thread.fetch_add(1) * scratch_size;
    std::vector<RowTask> bands;
    // All heads of a chunk before the next chunk: the heads of a token lie side by side in memory.
    for (int64_t i; (i = next.fetch_add(1)) < units * sweeps * chunks;)
      run(i % units, i / (units * chunks), i / units % chunks, bands, mine);
  }

  void run(int64_t unit, int64_t sweep, int64_t chunk, std::vector<RowTask>& bands, char* mine) {
    const int64_t b = unit / p->Hkv, kv = unit % p->Hkv, per_kv = p->H / p->Hkv;
    const Layout layout = layouts[layouts.size() > 1 ? b : 0].view();
    bands.clear();
    for (int64_t h = kv * per_kv; h < (kv + 1) * per_kv; ++h)
      for (RowTask band : segments[segments.size() > 1 ? b : 0]) {
        band.b = int32_t(b), band.h = int32_t(h);
        bands.push_back(band);
      }
    const FewRows rows{p,
                       &layout,
                       bands.data(),
                       int64_t(bands.size()),
                       b,
                       kv,
                       p->M * per_kv,
                       chunks,
                       sums.get() + unit * chunks * int64_t(chunk_bytes),
                       chunk_bytes};
    if (sweep) wait(unit);
    const int64_t first = layout.n_tiles * chunk / chunks, last = layout.n_tiles * (chunk + 1) / chunks;
    kernels->few_rows_sweep(&rows, chunk, int32_t(first), int32_t(last), sweep == 1, mine);
    if (left[unit * sweeps + sweep].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    if (sweep == 0) kernels->few_rows_merge(&rows);
    if (sweep + 1 == sweeps)
      kernels->few_rows_finish(&rows);
    else
      merged[unit].store(true, std::memory_order_release);
  }
};

}  // namespace

int flashbrush::attend_few_rows(const FbAttention* p, const Kernels* kernels, FbParallel parallel) {
  Job job;
  job.p = p, job.kernels = kernels;
  std::vector<char> shareable(p->C);
  for (int64_t c = 0; c < p->C; ++c) shareable[c] = always_read(p, c);
  int64_t most_tiles = 0;
  for (int64_t b = 0; b < (p->keys_by_item || p->valid ? p->B : 1); ++b) {
    job.layouts.push_back(lay_out(p, b, kForwardKeys, shareable));
    most_tiles = std::max<int64_t>(most_tiles, int64_t(job.layouts.back().tiles.size()));
  }
  for (int64_t b = 0; b < (p->rows_by_item ? p->B : 1); ++b)
    job.segments.push_back(cut_rows(p, b, kFewRows, 1));
  bool clipped = false;
  for (int64_t g = 0; g < p->G; ++g) clipped |= p->contrast[g * 4] == 2.f;
  job.units = p->B * p->Hkv;
  job.sweeps = clipped ? 2 : 1;
  job.chunks = key_chunks(job.units, most_tiles);
  const int threads = int(std::max<int64_t>(1, std::min<int64_t>(p->threads, job.units * job.chunks)));
  job.chunk_bytes = size_t(round_up(int64_t(kernels->few_rows_sums(p)), 64));
  job.scratch_size = size_t(round_up(int64_t(kernels->few_rows_scratch(p)), 4096));
  if (!allocate(job.sums, job.chunk_bytes * size_t(job.units * job.chunks)) ||
      !allocate(job.scratch, job.scratch_size * size_t(threads)))
    return kNoMemory;
  job.left.reset(new std::atomic<int64_t>[job.units * job.sweeps]);
  job.merged.reset(new std::atomic<bool>[job.units]);
  for (int64_t i = 0; i < job.units * job.sweeps; ++i)
    job.left[i].store(job.chunks, std::memory_order_relaxed);
  for (int64_t u = 0; u < job.units; ++u) job.merged[u].store(false, std::memory_order_relaxed);
  run_parallel(parallel, [](void* data) { static_cast<Job*>(data)->work(); }, &job, threads);
  return kOk;
}
