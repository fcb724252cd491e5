// Spreads the forward pass over threads. A unit is an (item, key head).
//
// Tasks are in ordered lists: for each unit first the packing of its K and V, in chunks of tiles, then its
// blocks of rows. Threads take the next task of a list. A block of rows waits for the packing of its unit; a
// packing waits for the unit whose buffer it takes over. A task waits only for earlier tasks of its own list,
// so threads cannot block each other. Which thread takes a task changes no sum: results are bitwise the same
// for any number of threads.
//
// Up to kOwnLists threads have a list of units each, and help with other lists when theirs has ended: what a
// thread packs is still in its caches when its blocks of rows read it. More threads share one list and two
// buffers.
//
// Threads never write the same memory at once. A packing task writes its own tiles of a buffer and then
// releases `packing`, which the blocks of rows acquire. A block of rows writes its own rows of out and lse,
// its own slot of masses and its thread's scratch, and then releases `running`, which the next packing of
// that buffer acquires. Masses are added up by one thread after the parallel region.
#include <sched.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "schedule/few_rows.h"
#include "schedule/layout.h"

using namespace flashbrush;

namespace {

// Rows of a block: as many as leave 32 blocks, so that every thread has several; more rows reuse a tile in L1
// more often. The number of threads must not matter here, since masses are summed by block.
int64_t block_rows(const FbAttention* p) {
  for (int64_t rows : {192, 96, 48})
    if (p->B * p->H * ((p->M + rows - 1) / rows) >= 32) return rows;
  return 24;
}

constexpr int kOwnLists = 4;  // more threads share one list, because every list needs a buffer

// The tasks of units i, i + lists, i + 2 * lists, ...: tasks first_task[n] .. first_task[n + 1] are the n-th
// unit's, its packing first.
struct List {
  std::vector<int64_t> first_task{0};
  std::atomic<int64_t> next{0};
};

struct Job {
  const FbAttention* p;
  const Kernels* kernels;
  std::vector<ItemLayout> layouts;           // one for all items, or one for each
  std::vector<std::vector<RowTask>> blocks;  // the same; b and h are set when a task runs
  std::vector<int64_t> first_slot;           // [B + 1]: the first slot of an item's masses
  std::unique_ptr<List[]> list;              // [lists]
  int64_t units, lists, buffers, chunks;     // chunks: packing tasks of a unit
  size_t unit_bytes, value_offset, sums_offset, scratch_size;
  Buffer packed, scratch, masses;
  std::unique_ptr<std::atomic<int64_t>[]> packing, running;  // [units]: packing tasks and blocks left
  std::atomic<int64_t> next_thread{0};

  const ItemLayout& layout(int64_t b) const { return layouts[layouts.size() > 1 ? b : 0]; }
  const std::vector<RowTask>& rows(int64_t b) const { return blocks[blocks.size() > 1 ? b : 0]; }

  Packed buffer_of(int64_t unit) const {
    char* base = packed.get() + (unit % buffers) * unit_bytes;
    return {base, base + value_offset, (float*)(base + sums_offset)};
  }

  static void wait(const std::atomic<int64_t>& left) {
    for (int spins = 0; left.load(std::memory_order_acquire) > 0; ++spins)
      if (spins > 200) sched_yield();
  }

  void pack(int64_t unit, int64_t chunk) {
    if (unit >= buffers) wait(running[unit - buffers]);
    const int64_t b = unit / p->Hkv;
    const Layout view = layout(b).view();
    const Packed to = buffer_of(unit);
    const int64_t first = view.n_tiles * chunk / chunks, last = view.n_tiles * (chunk + 1) / chunks;
    if (sums_offset < unit_bytes) memset(to.sums, 0, unit_bytes - sums_offset);
    Packed target = to;
    if (sums_offset == unit_bytes) target.sums = nullptr;
    kernels->pack(p, &view, b, unit % p->Hkv, first, last, &target);
    packing[unit].fetch_sub(1, std::memory_order_release);
  }

  void run(int64_t unit, int64_t index, char* thread_scratch) {
    const int64_t b = unit / p->Hkv, per_kv = p->H / p->Hkv;
    const std::vector<RowTask>& list = rows(b);
    // Neighbouring entries are the blocks of one query head, then of the next that shares the keys.
    RowTask task = list[index % list.size()];
    const int64_t local = (unit % p->Hkv) * per_kv + index / int64_t(list.size());
    task.b = int32_t(b), task.h = int32_t(local);
    task.slot = int32_t(first_slot[b] + local * int64_t(list.size()) + index % int64_t(list.size()));
    const Layout view = layout(b).view();
    const Packed from = buffer_of(unit);
    wait(packing[unit]);
    kernels->rows(p, &view, &task, &from, (float*)masses.get(), thread_scratch);
    running[unit].fetch_sub(1, std::memory_order_release);
  }

  void work() {
    const int64_t thread = next_thread.fetch_add(1);
    for (int64_t n = 0; n < lists; ++n) work_on((thread + n) % lists, scratch.get() + thread * scratch_size);
  }

  void work_on(int64_t which, char* thread_scratch) {
    List& from = list[which];
    for (int64_t i, n = 0; (i = from.next.fetch_add(1)) < from.first_task.back();) {
      while (from.first_task[n + 1] <= i) ++n;
      const int64_t unit = which + n * lists, local = i - from.first_task[n];
      if (local < chunks)
        pack(unit, local);
      else
        run(unit, local - chunks, thread_scratch);
    }
  }
};

void reduce_masses(const Job& job) {
  const FbAttention* p = job.p;
  memset(p->mass, 0, sizeof(float) * size_t(p->B * p->H * p->R * p->C));
  for (int64_t b = 0; b < p->B; ++b) {
    const std::vector<RowTask>& list = job.rows(b);
    for (int64_t h = 0; h < p->H; ++h)
      for (size_t n = 0; n < list.size(); ++n) {
        const float* from = (const float*)job.masses.get() +
                            (job.first_slot[b] + h * int64_t(list.size()) + int64_t(n)) * p->C;
        float* to = p->mass + ((b * p->H + h) * p->R + list[n].segment) * p->C;
        for (int64_t c = 0; c < p->C; ++c) to[c] += from[c];
      }
  }
}

// derived[H] of item b: floor + span * normalise(mass per row) over heads (arXiv 2505.20271, Eqs. 6-8).
void derive_gains(const FbAttention* p, int64_t b, float* derived) {
  const int32_t* lengths = p->row_lengths + (p->rows_by_item ? b * p->R : 0);
  int64_t count = 0;
  for (int64_t r = 0; r < p->R; ++r) count += p->gain_rows[r] ? lengths[r] : 0;
  float low = __builtin_inff(), high = -__builtin_inff();
  double total = 0.;
  for (int64_t h = 0; h < p->H; ++h) {
    const float* mass = p->mass + (b * p->H + h) * p->R * p->C;
    float block = 0.f;
    for (int64_t r = 0; r < p->R; ++r)
      for (int64_t c = 0; c < p->C; ++c)
        if (p->gain_rows[r] && p->gain_keys[c]) block += mass[r * p->C + c];
    derived[h] = block / float(std::max<int64_t>(count, 1));
    low = std::min(low, derived[h]), high = std::max(high, derived[h]), total += derived[h];
  }
  const float eps = 1.1920929e-7f;
  double exps = 0.;
  for (int64_t h = 0; h < p->H; ++h) exps += std::exp(double(derived[h] - high));
  for (int64_t h = 0; h < p->H; ++h) {
    const float m = derived[h];
    float relative = 0.f;
    switch (p->derived) {
      case 0:
        relative = (m - low) / (high - low + eps);
        break;
      case 1:
        relative = m / std::max(float(total / double(p->H)), eps);
        break;
      case 2:
        relative = m / std::max(high, eps);
        break;
      default:
        relative = float(double(p->H) * std::exp(double(m - high)) / exps);
    }
    derived[h] = p->floor + p->span * relative;
  }
}

struct Scale {
  const FbAttention* p;
  const Kernels* kernels;
  std::vector<float> derived;  // [B][H]
  std::atomic<int64_t> next{0};

  void work() {
    constexpr int64_t step = 64;
    const int64_t parts = (p->M + step - 1) / step;
    for (int64_t i; (i = next.fetch_add(1)) < p->B * parts;) {
      const int64_t b = i / parts, first = i % parts * step, last = std::min(p->M, first + step);
      const int32_t* lengths = p->row_lengths + (p->rows_by_item ? b * p->R : 0);
      int64_t r = 0, end = lengths[0];
      for (int64_t row = first; row < last; ++row) {
        while (row >= end) end += lengths[++r];
        if (p->gain_apply[r]) kernels->scale_row(p, b, row, derived.data() + b * p->H);
      }
    }
  }
};

void apply_gains(const FbAttention* p, const Kernels* kernels, FbParallel parallel, int threads) {
  Scale job{p, kernels, std::vector<float>(size_t(p->B * p->H), 1.f), {}};
  for (int64_t b = 0; b < p->B; ++b) {
    if (p->derived >= 0) derive_gains(p, b, job.derived.data() + b * p->H);
    for (int64_t h = 0; p->gains && h < p->H; ++h)
      for (int64_t r = 0; r < p->R; ++r) {
        const float given =
            p->gain.data ? p->gain.data[b * p->gain.stride_b + h * p->gain.stride_h + r] : 1.f;
        p->gains[(b * p->H + h) * p->R + r] =
            given * (p->derived >= 0 && p->gain_apply[r] ? job.derived[b * p->H + h] : 1.f);
      }
  }
  if (p->derived < 0) return;
  const bool small = p->B * p->M * p->H * p->D < 65536;
  run_parallel(parallel, [](void* data) { static_cast<Scale*>(data)->work(); }, &job, small ? 1 : threads);
}

}  // namespace

FLASHBRUSH_EXPORT int flashbrush_attention(const FbAttention* p, const char* isa, FbParallel parallel) {
  if (p->abi != FLASHBRUSH_ABI) return kOtherVersion;
  const Kernels* kernels = find(isa);
  if (!kernels) return kNoIsa;
  if (has_few_rows(p, kernels)) {
    if (p->mass) memset(p->mass, 0, sizeof(float) * size_t(p->B * p->H * p->R * p->C));
    const int status = attend_few_rows(p, kernels, parallel);
    if (status == kOk) apply_gains(p, kernels, parallel, p->threads);
    return status;
  }
  Job job;
  job.p = p, job.kernels = kernels;
  std::vector<char> shareable(p->C);
  for (int64_t c = 0; c < p->C; ++c) shareable[c] = always_read(p, c);
  const bool by_item = p->keys_by_item || p->valid;
  int64_t most_tiles = 0;
  for (int64_t b = 0; b < (by_item ? p->B : 1); ++b) {
    job.layouts.push_back(lay_out(p, b, kForwardKeys, shareable));
    most_tiles = std::max<int64_t>(most_tiles, job.layouts.back().tiles.size());
  }
  const int64_t limit = block_rows(p);
  for (int64_t b = 0; b < (p->rows_by_item ? p->B : 1); ++b)
    job.blocks.push_back(cut_rows(p, b, limit, kernels->row_group));
  bool linear = false;
  for (int64_t g = 0; g < p->G; ++g) linear |= p->contrast[g * 4] == 1.f;

  job.units = p->B * p->Hkv;
  // The sums over a segment's values have one order: one thread packs.
  job.chunks = linear ? 1 : std::max<int64_t>(1, std::min<int64_t>(most_tiles / 2, 8));
  job.first_slot.assign(p->B + 1, 0);
  for (int64_t b = 0; b < p->B; ++b)
    job.first_slot[b + 1] = job.first_slot[b] + p->H * int64_t(job.rows(b).size());
  job.packing.reset(new std::atomic<int64_t>[job.units]);
  job.running.reset(new std::atomic<int64_t>[job.units]);
  int64_t tasks = 0;
  for (int64_t u = 0; u < job.units; ++u) {
    const int64_t blocks = int64_t(job.rows(u / p->Hkv).size()) * (p->H / p->Hkv);
    job.packing[u].store(job.chunks, std::memory_order_relaxed);
    job.running[u].store(blocks, std::memory_order_relaxed);
    tasks += job.chunks + blocks;
  }
  job.value_offset = size_t(round_up(most_tiles * int64_t(kernels->key_tile_bytes(p)), 64));
  job.sums_offset =
      job.value_offset + size_t(round_up(most_tiles * int64_t(kernels->value_tile_bytes(p)), 64));
  job.unit_bytes = job.sums_offset + (linear ? size_t(p->C * round_up(p->D, kernels->dim_multiple)) * 4 : 0);
  job.unit_bytes = linear ? size_t(round_up(int64_t(job.unit_bytes), 64)) : job.unit_bytes;
  const int threads = int(std::max<int64_t>(1, std::min<int64_t>(p->threads, tasks)));
  job.lists = threads <= kOwnLists && threads <= job.units ? threads : 1;
  job.buffers = job.lists > 1 ? job.lists : std::min<int64_t>(job.units, threads > 1 ? 2 : 1);
  job.list.reset(new List[job.lists]);
  for (int64_t u = 0; u < job.units; ++u) {
    std::vector<int64_t>& first = job.list[u % job.lists].first_task;
    first.push_back(first.back() + job.chunks + job.running[u].load(std::memory_order_relaxed));
  }
  job.scratch_size =
      size_t(round_up(int64_t(kernels->scratch_bytes(p, round_up(limit, kernels->row_group))), 4096));
  if (!allocate(job.packed, job.unit_bytes * size_t(job.buffers)) ||
      !allocate(job.scratch, job.scratch_size * size_t(threads)) ||
      (p->mass && !allocate(job.masses, sizeof(float) * size_t(job.first_slot[p->B] * p->C))))
    return kNoMemory;
  run_parallel(parallel, [](void* data) { static_cast<Job*>(data)->work(); }, &job, threads);
  if (p->mass) reduce_masses(job);
  apply_gains(p, kernels, parallel, threads);
  return kOk;
}
