// Shared memory of the emulated block, its barriers, and copies of tiles.
#pragma once
#include "emulated_threads.h"

namespace flashbrush::emulation {

constexpr uint32_t kBase =
    1024;                  // first address of shared memory; not 0, so that an offset is not an address
constexpr int kRow = 128;  // bytes of a tile's row
constexpr size_t kMargin =
    4096;  // bytes on both sides of shared memory; a change there is a store out of bounds
constexpr uint8_t kMarginByte = 0xa7;

// The address that hardware accesses in a swizzled tile: bits 4-6 ^= bits 7-9, of the address, not of the
// offset.
inline uint32_t swizzle(uint32_t address) {
  return address ^ (address >> 7 & 7) << 4;
}

// The arguments of make_map; elements have 16 bits.
struct alignas(64) TensorMap {
  const char* base;
  int64_t rows, heads, items, dim, row_stride, head_stride, item_stride;
  int box_rows;
  uint32_t valid;
};
constexpr uint32_t kValidMap = 0x70616d66;

struct Memory {
  std::vector<uint8_t> storage;
  uint8_t* bytes = nullptr;
  uint32_t size = 0;

  void start(int count) {
    size = uint32_t(count);
    storage.assign(size + 2 * kMargin + 1024, kMarginByte);
    const uintptr_t first = uintptr_t(storage.data()) + kMargin;
    bytes = storage.data() + kMargin + (1024 - first % 1024) % 1024;
    memset(bytes, 0xff, size);
  }
  void check_margins() const {
    for (const uint8_t* p = storage.data(); p < storage.data() + storage.size(); ++p)
      if ((p < bytes || p >= bytes + size) && *p != kMarginByte)
        fail("a store out of shared memory, at offset %ld", long(p - bytes));
  }
  uint32_t address(const void* p) const {
    const auto at = static_cast<const uint8_t*>(p);
    if (at < bytes || at > bytes + size) fail("an address that is not of shared memory");
    return uint32_t(at - bytes) + kBase;
  }
  uint8_t* at(uint32_t address, uint32_t count, const char* what) {
    if (address < kBase || uint64_t(address) + count > uint64_t(kBase) + size)
      fail("%s out of shared memory: offset %ld, %u bytes of %u", what, long(address) - long(kBase), count,
           size);
    return bytes + (address - kBase);
  }
};

// Barriers in memory.

struct MemoryBarrier {
  int arrivals = 0, pending = 0, initialiser = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
  bool published = false;
};
// Written to the 8 bytes of a barrier, which the kernel must not write.
constexpr uint64_t kBarrierMark = 0x6272617272696572u;

struct Barriers {
  Memory& memory;
  std::map<uint32_t, MemoryBarrier> all;

  static constexpr int64_t kMostBytes = (1 << 20) - 1;

  void init(uint32_t address, int arrivals, int thread) {
    if (address % 8) fail("a barrier at offset %u, no multiple of 8", address - kBase);
    if (arrivals < 1 || arrivals > kMostBytes) fail("a barrier of %d arrivals", arrivals);
    const uint64_t mark = kBarrierMark ^ address;
    memcpy(memory.at(address, 8, "a barrier"), &mark, 8);
    MemoryBarrier b;
    b.arrivals = b.pending = arrivals;
    b.initialiser = thread;
    all[address] = b;
  }
  void publish(int thread) {
    for (auto& [address, b] : all) b.published |= b.initialiser == thread;
  }
  MemoryBarrier& find(uint32_t address) {
    uint64_t mark = 0;
    memcpy(&mark, memory.at(address, 8, "a barrier"), 8);
    const auto found = all.find(address);
    if (found == all.end()) fail("no barrier was initialised at offset %u", address - kBase);
    if (mark != (kBarrierMark ^ address)) fail("the barrier at offset %u was written over", address - kBase);
    return found->second;
  }
  void settle(MemoryBarrier& b) {
    if (b.pending || b.bytes) return;
    b.pending = b.arrivals;
    ++b.phase;
  }
  void arrive(uint32_t address, int64_t expected) {
    MemoryBarrier& b = find(address);
    if (!b.pending)
      fail("the barrier at offset %u gets more than its %d arrivals in a phase", address - kBase, b.arrivals);
    count_bytes(b, address, expected);
    --b.pending;
    settle(b);
  }
  void complete(uint32_t address, int64_t copied) {
    MemoryBarrier& b = find(address);
    count_bytes(b, address, -copied);
    settle(b);
  }
  void count_bytes(MemoryBarrier& b, uint32_t address, int64_t more) {
    b.bytes += more;
    if (b.bytes > kMostBytes || b.bytes < -kMostBytes)
      fail("the barrier at offset %u awaits %ld bytes", address - kBase, long(b.bytes));
  }
  std::string describe(uint32_t address, uint32_t parity) {
    const MemoryBarrier& b = find(address);
    return "barrier at shared offset " + std::to_string(address - kBase) + ", parity " +
           std::to_string(parity) + " (phase " + std::to_string(b.phase) + " lacks " +
           std::to_string(b.pending) + " of " + std::to_string(b.arrivals) + " arrivals and " +
           std::to_string(b.bytes) + " bytes)";
  }
};

// Barriers by number.

struct NamedBarriers {
  struct Named {
    int threads = 0, arrived = 0;
    uint64_t completed = 0;
    uint32_t warps = 0;
  } all[16];

  // The 32 threads of a warp arrive. Returns the number of completions that a wait is for.
  uint64_t arrive(int id, int count, int warp, int block) {
    if (id < 0 || id > 15) fail("named barrier %d", id);
    if (count < kWarp || count % kWarp || count > block)
      fail("named barrier %d of %d threads in a block of %d", id, count, block);
    Named& b = all[id];
    if (b.arrived && b.threads != count)
      fail("named barrier %d of %d threads, and of %d for those that came before", id, count, b.threads);
    if (b.warps >> warp & 1) fail("warp %d came to named barrier %d twice before the others", warp, id);
    b.threads = count;
    b.warps |= 1u << warp;
    b.arrived += kWarp;
    const uint64_t awaited = b.completed + 1;
    if (b.arrived == count) {
      b.arrived = 0;
      b.warps = 0;
      ++b.completed;
    }
    return awaited;
  }
  std::string describe(int id) const {
    return "named barrier " + std::to_string(id) + " (" + std::to_string(all[id].arrived) + " of " +
           std::to_string(all[id].threads) + " threads came)";
  }
};

// Copies.

// Copies of tiles, performed in any order. The target becomes NaN when a copy is issued and is written when
// it is performed.
struct Copies : Engine {
  struct Copy {
    TensorMap map;
    uint32_t to, barrier, bytes;
    int column, row, head, item;
  };
  Memory& memory;
  Barriers& barriers;
  Random& random;
  Pace pace;
  std::vector<Copy> waiting;
  int first_unwilling = 0;

  Copies(Memory& memory, Barriers& barriers, Random& random)
      : memory(memory), barriers(barriers), random(random) {}

  // Where the 16-byte chunk at `offset` of a tile is in memory.
  uint8_t* chunk(const Copy& c, uint32_t offset) {
    return memory.at(swizzle(c.to + offset), 16, "a tile copy");
  }

  void issue(const TensorMap& map, uint32_t to, uint32_t barrier, int column, int row, int head, int item) {
    if (map.valid != kValidMap) fail("a tile copy by a map that make_map did not make");
    if (to % kRow) fail("a tile copied to offset %u, no multiple of %d", to - kBase, kRow);
    if (!barriers.find(barrier).published)
      fail("a tile copy on a barrier that was not published, at offset %u", barrier - kBase);
    const Copy c{map, to, barrier, uint32_t(map.box_rows * kRow), column, row, head, item};
    memory.at(to, c.bytes, "a tile copy");
    for (const Copy& other : waiting)
      if (to < other.to + other.bytes && other.to < to + c.bytes)
        fail("two tile copies at once to offset %u", to - kBase);
    for (uint32_t offset = 0; offset < c.bytes; offset += 16) memset(chunk(c, offset), 0xff, 16);
    if (!pace.at_once && random.chance(pace.unwilling)) {
      waiting.push_back(c);
    } else {
      waiting.insert(waiting.begin() + first_unwilling++, c);
      if (pace.at_once) perform(first_unwilling - 1);
    }
  }
  int pending() const override { return int(waiting.size()); }
  int willing() const override { return first_unwilling; }
  void perform(int which) override {
    const Copy c = waiting[size_t(which)];
    waiting.erase(waiting.begin() + which);
    first_unwilling -= which < first_unwilling;
    const bool outside = c.head < 0 || c.head >= c.map.heads || c.item < 0 || c.item >= c.map.items;
    uint32_t offset = 0;
    for (int64_t row = c.row; row < int64_t(c.row) + c.map.box_rows; ++row) {
      const bool zero = outside || row < 0 || row >= c.map.rows;
      const char* from = c.map.base;
      if (!zero) from += row * c.map.row_stride + c.head * c.map.head_stride + c.item * c.map.item_stride;
      for (int i = 0; i < kRow; offset += 16) {
        uint8_t* to = chunk(c, offset);
        for (const int end = i + 16; i < end; i += 2, to += 2) {
          const int64_t column = int64_t(c.column) + i / 2;
          if (zero || column < 0 || column >= c.map.dim)
            memset(to, 0, 2);
          else
            memcpy(to, from + 2 * column, 2);
        }
      }
    }
    barriers.complete(c.barrier, c.bytes);
  }
  std::string in_flight() const override {
    return waiting.empty() ? "" : std::to_string(waiting.size()) + " tile copies";
  }
};

}  // namespace flashbrush::emulation
