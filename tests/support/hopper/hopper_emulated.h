// The functions of csrc/cuda/hopper.cuh and host.cuh on the CPU, for kernels that use nothing else of CUDA.
// Blocks run one after another, the threads of a block as fibers. A seed decides when copies and products are
// performed and in which order warps run: a kernel that fails to wait is wrong with some seeds, and a kernel
// that can never end is an error that launch() returns.
//
// Stricter than hardware: register arrays of a product (accumulators and a) must live and stay unchanged
// until the product was awaited, and begin_products() must precede the first product of every group. Not
// detected: stores without publish_stores(), races of ordinary accesses within one turn of a warp, loops that
// call none of these functions, the time that anything takes.
#pragma once
#include <cmath>
#include <memory>
#include <mutex>

#include "emulated_products.h"

#define FB_INLINE inline
#define FB_DEVICE static FB_INLINE
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

namespace flashbrush {
namespace emulation {

struct Block {
  int index, count, threads;
  Scheduler scheduler;
  Memory memory;
  Barriers barriers{memory, {}};
  NamedBarriers named;
  Copies copies{memory, barriers, scheduler.random};
  Pace products_pace;
  std::vector<std::unique_ptr<Group>> groups;
  std::vector<std::vector<int>> claims;  // [warps]: the numbers of registers it asked for
  std::vector<int> registers;            // [warps]: of each thread now
  int free_registers = 0;

  Block(int index, int count, int threads, int shared_bytes, uint64_t seed)
      : index(index), count(count), threads(threads) {
    scheduler.random.state = seed + 0x632be59bd9b4e019u * uint64_t(index);
    memory.start(shared_bytes);
    scheduler.engines.push_back({&copies, &copies.pace});
    for (int i = 0; i + kGroup <= threads; i += kGroup) {
      groups.push_back(std::make_unique<Group>(memory, products_pace, scheduler.random, i));
      scheduler.engines.push_back({groups.back().get(), &products_pace});
    }
    claims.resize(size_t(threads / kWarp));
    registers.assign(size_t(threads / kWarp), std::min(256, 65536 / threads / 8 * 8));
  }

  int thread() const { return scheduler.current->index; }
  int warp() const { return thread() / kWarp; }
  Group& group() {
    if (size_t(thread() / kGroup) >= groups.size())
      fail("a warp group's operation by threads that are not in one");
    return *groups[size_t(thread() / kGroup)];
  }

  // Waits for the other threads of the warp.
  void meet(const char* operation, uint64_t detail = 0) {
    scheduler.meet(operation, detail, {}, [](Warp&, Warp::Slot*, uint64_t*) {});
  }

  // Arrives at a named barrier; waits there if `stay`.
  void come(int id, int of_threads, bool stay) {
    uint64_t awaited = 0;
    const int parity = int(scheduler.warp().meetings & 1);
    scheduler.meet(stay ? "bar.sync" : "bar.arrive", uint64_t(id) << 32 | uint32_t(of_threads), {},
                   [&](Warp&, Warp::Slot*, uint64_t* result) {
                     *result = named.arrive(id, of_threads, warp(), threads);
                   });
    awaited = scheduler.warp().result[parity];
    if (stay)
      scheduler.wait_until([this, id, awaited] { return named.all[id].completed >= awaited; },
                           [this, id] { return named.describe(id); });
    else
      scheduler.pause();
  }

  void wait(uint32_t address, uint32_t parity) {
    if (parity > 1) fail("a wait for parity %u", parity);
    barriers.find(address);
    scheduler.pause();
    scheduler.wait_until([this, address, parity] { return (barriers.find(address).phase & 1) != parity; },
                         [this, address, parity] { return barriers.describe(address, parity); });
  }

  void await_products(int pending) {
    Group& g = group();
    const int t = thread() % kGroup;
    const uint64_t needed = g.needed(t, pending);
    scheduler.wait_until([&g, needed] { return g.performed >= needed; },
                         [&g, needed] {
                           return "products of its warp group (" + std::to_string(g.performed) + " of " +
                                  std::to_string(needed) + " are done)";
                         });
    g.retire(t, pending);
  }

  // give_registers and take_registers. Free registers are those that other warps gave.
  void claim_registers(int now, bool more) {
    meet(more ? "setmaxnreg.inc" : "setmaxnreg.dec", uint64_t(now));
    int& mine = registers[size_t(warp())];
    std::vector<int>& claimed = claims[size_t(warp())];
    group();
    if (scheduler.lane() == 0) claimed.push_back(now);
    if (now % 8 || now < 24 || now > 256) fail("%d registers", now);
    if (more ? mine > now : mine < now) fail("%s registers: %d of %d", more ? "take" : "give", now, mine);
    const int needed = (now - mine) * kWarp;
    scheduler.wait_until([this, &mine, now, needed] { return mine == now || free_registers >= needed; },
                         [this, now] {
                           return std::to_string(now) + " registers (" + std::to_string(free_registers) +
                                  " are free)";
                         });
    if (mine == now) return;
    free_registers -= needed;
    mine = now;
  }

  void finish_thread() {
    const int t = thread();
    if (size_t(t / kGroup) >= groups.size()) return;
    if (!groups[size_t(t / kGroup)]->members[t % kGroup].held.empty())
      fail("ends with products that were not awaited");
  }
  void finish() {
    memory.check_margins();
    for (auto& [engine, pace] : scheduler.engines)
      if (!engine->in_flight().empty()) fail("the block ends with %s in flight", engine->in_flight().c_str());
    for (size_t w = 0; w < claims.size(); ++w)
      if (claims[w] != claims[w / 4 * 4])
        fail("warps %zu and %zu, of a warp group, ask for different registers", w / 4 * 4, w);
  }
};

inline Block*& block() {
  static Block* current = nullptr;
  return current;
}
// Held during a launch: only one at a time.
inline std::mutex& only() {
  static std::mutex mutex;
  return mutex;
}
inline uint64_t& seed() {
  static uint64_t value = 0;
  return value;
}

// Both round to nearest, ties to even.
inline uint16_t round_bfloat(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t round_half(float x) {
  if (x != x) return 0x7fff;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float y = std::fabs(x);
  if (y >= 65520.0f) return uint16_t(sign | 0x7c00);
  if (y < 0x1p-14f) return uint16_t(sign | uint16_t(std::nearbyint(y * 0x1p24f)));
  int exponent;
  const float fraction = std::frexp(y, &exponent);  // of [0.5, 1)
  const int mantissa = int(std::nearbyint(fraction * 2048));
  return uint16_t(sign | (((exponent + 14) << 10) + mantissa - 1024));
}

}  // namespace emulation

struct bfloat16 {
  uint16_t bits;
  static constexpr bool half = false;
  static uint16_t round(float x) { return emulation::round_bfloat(x); }
};
struct float16 {
  uint16_t bits;
  static constexpr bool half = true;
  static uint16_t round(float x) { return emulation::round_half(x); }
};
using emulation::TensorMap;
using Barrier = uint64_t;
using Stream = void*;

// Threads.

FB_DEVICE int thread_index() {
  return emulation::block()->thread();
}
FB_DEVICE int block_index() {
  return emulation::block()->index;
}
FB_DEVICE int block_count() {
  return emulation::block()->count;
}
FB_DEVICE void sync_block() {
  emulation::block()->come(0, emulation::block()->threads, true);
}
FB_DEVICE void sync_some(int id, int threads) {
  if (id == 0) emulation::fail("named barrier 0 belongs to sync_block");
  emulation::block()->come(id, threads, true);
}
FB_DEVICE void arrive_some(int id, int threads) {
  if (id == 0) emulation::fail("named barrier 0 belongs to sync_block");
  emulation::block()->come(id, threads, false);
}

namespace emulation {
// Every lane passes a value; returns that of lane `from`.
inline uint32_t exchange(const char* operation, uint64_t detail, uint32_t value, int from) {
  Scheduler& s = block()->scheduler;
  const int parity = int(s.warp().meetings & 1);
  s.meet(operation, detail, {0, {value, 0, 0, 0}}, [](Warp&, Warp::Slot*, uint64_t*) {});
  return s.warp().slots[parity][from].words[0];
}
}  // namespace emulation

FB_DEVICE float bits_to_float(int x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
FB_DEVICE int float_to_bits(float x) {
  int y;
  memcpy(&y, &x, 4);
  return y;
}
FB_DEVICE float shuffle_xor(float x, int mask) {
  if (mask < 0 || mask > 31) emulation::fail("shuffle_xor by %d", mask);
  const int from = emulation::block()->scheduler.lane() ^ mask;
  return bits_to_float(
      int(emulation::exchange("shuffle_xor", uint64_t(mask), uint32_t(float_to_bits(x)), from)));
}
FB_DEVICE int shuffle_xor(int x, int mask) {
  return float_to_bits(shuffle_xor(bits_to_float(x), mask));
}
FB_DEVICE void sync_warp() {
  emulation::block()->meet("sync_warp");
}
FB_DEVICE uint32_t votes_of_warp(bool x) {
  emulation::Scheduler& s = emulation::block()->scheduler;
  const int parity = int(s.warp().meetings & 1);
  emulation::exchange("votes_of_warp", 0, x, 0);
  uint32_t votes = 0;
  for (int i = 0; i < emulation::kWarp; ++i) votes |= uint32_t(s.warp().slots[parity][i].words[0] != 0) << i;
  return votes;
}
FB_DEVICE bool any_of_warp(bool x) {
  return votes_of_warp(x) != 0;
}
FB_DEVICE int count_bits(uint32_t x) {
  return __builtin_popcount(x);
}
FB_DEVICE int uniform(int x) {
  return int(emulation::exchange("uniform", 0, uint32_t(x), 0));
}
template <int COUNT>
FB_DEVICE void give_registers() {
  emulation::block()->claim_registers(COUNT, false);
}
template <int COUNT>
FB_DEVICE void take_registers() {
  emulation::block()->claim_registers(COUNT, true);
}

// Shared memory.

FB_DEVICE char* shared_memory() {
  return reinterpret_cast<char*>(emulation::block()->memory.bytes);
}
FB_DEVICE uint32_t shared_address(const void* p) {
  return emulation::block()->memory.address(p);
}

FB_DEVICE void init_barrier(Barrier* b, int arrivals) {
  emulation::block()->barriers.init(shared_address(b), arrivals, thread_index());
}
FB_DEVICE void publish_barriers() {
  emulation::block()->barriers.publish(thread_index());
}
FB_DEVICE void arrive(Barrier* b) {
  emulation::block()->barriers.arrive(shared_address(b), 0);
  emulation::block()->scheduler.pause();
}
FB_DEVICE void arrive_expecting(Barrier* b, uint32_t bytes) {
  emulation::block()->barriers.arrive(shared_address(b), bytes);
  emulation::block()->scheduler.pause();
}
FB_DEVICE void wait(Barrier* b, uint32_t parity) {
  emulation::block()->wait(shared_address(b), parity);
}

FB_DEVICE void prefetch_map(const TensorMap* map) {
  if (map->valid != emulation::kValidMap) emulation::fail("a map that make_map did not make");
}
FB_DEVICE void copy_tile(void* to, const TensorMap* map, Barrier* b, int column, int row, int head,
                         int item) {
  if (uintptr_t(map) % 64) emulation::fail("a map not aligned to 64 bytes");
  emulation::block()->copies.issue(*map, shared_address(to), shared_address(b), column, row, head, item);
  emulation::block()->scheduler.pause();
}
FB_DEVICE void publish_stores() {}

// Numbers.

FB_DEVICE float exp2_fast(float x) {
  return std::exp2(x);
}
FB_DEVICE float log2_fast(float x) {
  return std::log2(x);
}
FB_DEVICE float maximum(float a, float b) {
  return std::fmax(a, b);
}
FB_DEVICE float maximum_or_nan(float a, float b) {
  return a != a || b != b ? a + b : std::fmax(a, b);
}
template <typename T>
FB_DEVICE uint32_t pack(float low, float high) {
  return uint32_t(T::round(low)) | uint32_t(T::round(high)) << 16;
}

// Products.

FB_DEVICE uint64_t operand(const void* p, int step, int stride) {
  return uint64_t((shared_address(p) & 0x3ffff) >> 4) | uint64_t(step >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}
FB_DEVICE uint64_t advance(uint64_t operand, int bytes) {
  return operand + uint64_t(bytes >> 4);
}
FB_DEVICE void begin_products() {
  emulation::block()->group().begin(thread_index() % emulation::kGroup);
}
FB_DEVICE void commit_products() {
  emulation::block()->group().commit(thread_index() % emulation::kGroup);
}
template <int PENDING>
FB_DEVICE void await_products() {
  emulation::block()->await_products(PENDING);
}
FB_DEVICE void finish(float) {}
template <int COUNT>
FB_DEVICE void pin(float (&)[COUNT]) {}
template <int COUNT>
FB_DEVICE void pin(uint32_t (&)[COUNT]) {}

namespace emulation {
template <typename T, int N>
void multiply(float* c, const uint32_t* registers, uint64_t a, uint64_t b, bool add) {
  static_assert(N == 64 || N == 80 || N == 128 || N == 160 || N == 176 || N == 192);
  Product p;
  p.half = T::half;
  p.add = add;
  p.from_registers = registers != nullptr;
  p.columns = N;
  p.a = a;
  p.b = b;
  block()->group().issue(block()->thread() % kGroup, c, p, registers);
}
}  // namespace emulation

template <typename T, int N>
FB_DEVICE void multiply(float (&c)[N / 2], uint64_t a, uint64_t b, bool add) {
  emulation::multiply<T, N>(c, nullptr, a, b, add);
}
template <typename T, int N>
FB_DEVICE void multiply(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  emulation::multiply<T, N>(c, a, 0, b, add);
}

// Host.

inline bool make_map(TensorMap* map, bool, const void* base, int64_t rows, int64_t heads, int64_t items,
                     int64_t dim, int64_t row_stride, int64_t head_stride, int64_t item_stride,
                     int box_rows) {
  map->valid = 0;
  for (int64_t size : {rows, heads, items, dim})
    if (size < 1 || size > int64_t(1) << 32) return false;
  for (int64_t stride : {row_stride, head_stride, item_stride})
    if (stride % 16 || stride < 0 || stride >= int64_t(1) << 40) return false;
  if (uintptr_t(base) % 16 || !base || box_rows < 1 || box_rows > 256) return false;
  *map = {static_cast<const char*>(base),
          rows,
          heads,
          items,
          dim,
          row_stride,
          head_stride,
          item_stride,
          box_rows,
          emulation::kValidMap};
  return true;
}

// Returns 0, or an error whose reason goes to stderr.
template <typename Parameters>
int launch(void (*kernel)(Parameters), const Parameters& parameters, int blocks, int threads,
           int shared_bytes, Stream) {
  const std::lock_guard<std::mutex> lock(emulation::only());
  if (blocks < 1 || threads < 1 || threads > emulation::kMostThreads || threads % emulation::kWarp ||
      shared_bytes < 0 || shared_bytes > 227 << 10) {
    fprintf(stderr, "emulated launch: %d blocks of %d threads, %d bytes\n", blocks, threads, shared_bytes);
    return emulation::kMisuse;
  }
  for (int i = 0; i < blocks; ++i) {
    emulation::Block block(i, blocks, threads, shared_bytes, emulation::seed());
    emulation::block() = &block;
    std::string message;
    int error = block.scheduler.run(
        threads,
        [&] {
          kernel(parameters);
          block.finish_thread();
        },
        &message);
    try {
      if (!error) block.finish();
    } catch (const emulation::Failure& e) {
      message = e.what();
      error = emulation::kMisuse;
    }
    emulation::block() = nullptr;
    if (!error) continue;
    fprintf(stderr, "emulated launch: block %d, seed %llu: %s\n", i,
            static_cast<unsigned long long>(emulation::seed()), message.c_str());
    return error;
  }
  return 0;
}

inline const char* error_text(int status) {
  return status > 0 ? "the emulation found an error, see stderr" : nullptr;
}

}  // namespace flashbrush

extern "C" __attribute__((visibility("default"), used)) inline void flashbrush_emulation_seed(uint64_t seed) {
  flashbrush::emulation::seed() = seed;
}
