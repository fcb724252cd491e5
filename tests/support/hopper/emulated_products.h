// Products of warp groups. A product is issued when all 128 threads have called it, and performed later, in
// order of issue; only then are its operands in shared memory read. Its registers are checked: accumulators
// are a signalling NaN from the issue to the wait that completes the product, and neither they nor the
// registers of a may change until then.
//
// Where a 16-bit element is, in bytes from the descriptor's start, before the address is swizzled:
//   contiguous along the summed dimension, row r and summed k < 16:   r / 8 * stride + r % 8 * 128 + 2 k
//   contiguous across it, summed k and column n:   k / 8 * stride + k % 8 * 128 + n / 64 * step + 2 (n % 64)
#pragma once
#include <deque>
#include <memory>

#include "emulated_memory.h"

namespace flashbrush::emulation {

constexpr int kRowsOfProduct = 64, kSummed = 16, kMostColumns = 192;
constexpr uint32_t kPoison = 0x7fa5a5a5;  // arithmetic makes a quiet NaN of it, which has other bits

typedef float Lanes __attribute__((vector_size(64)));  // 16 columns

struct Accumulator {
  int columns = 0;
  alignas(64) float values[kRowsOfProduct][kMostColumns] = {};
};

// Which element a thread of the group holds in register i, see hopper.cuh.
inline int row_of(int thread, int i) {
  return 16 * (thread / kWarp) + thread % kWarp / 4 + 8 * (i / 2 % 2);
}
inline int column_of(int thread, int i) {
  return 8 * (i / 4) + 2 * (thread % 4) + i % 2;
}

using Decode = float (*)(uint16_t);

struct Descriptor {
  uint32_t start, step, stride;
  explicit Descriptor(uint64_t bits)
      : start(uint32_t(bits & 0x3fff) << 4),
        step(uint32_t(bits >> 16 & 0x3fff) << 4),
        stride(uint32_t(bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1)
      fail("a descriptor of another swizzle than 128 bytes: %016lx", static_cast<unsigned long>(bits));
    if (bits & ~0xc0003fff3fff3fffu)
      fail("a descriptor with bits that are not used: %016lx", static_cast<unsigned long>(bits));
    if (stride % 1024) fail("a descriptor whose stride of %u is no multiple of 1024", stride);
  }
};

struct Product {
  bool half = false, add = false, from_registers = false;
  int columns = 0, issued = 0;
  uint64_t a = 0, b = 0, group = 0;
  std::shared_ptr<Accumulator> sum;
  const uint32_t* registers[kGroup];
};

struct Group : Engine {
  struct Held {  // a thread's accumulator of a product that was not awaited
    float* c;
    std::shared_ptr<Accumulator> sum;
    uint64_t group;
  };
  struct HeldA {
    const uint32_t* a;
    uint32_t values[4];
    uint64_t group;
  };
  struct Member {
    uint64_t issued = 0, commits = 0;
    std::vector<uint64_t> ends;  // products before the end of each group
    std::vector<Held> held;
    std::vector<HeldA> held_a;
    bool begun = false;
  } members[kGroup];
  Memory& memory;
  Pace& pace;
  Random& random;
  int first_thread;
  std::deque<Product> products;
  uint64_t performed = 0;
  bool unwilling = false;  // whether the next product waits until nothing else can happen

  Group(Memory& memory, Pace& pace, Random& random, int first_thread)
      : memory(memory), pace(pace), random(random), first_thread(first_thread) {}

  void begin(int t) { members[t].begun = true; }
  void commit(int t) {
    Member& m = members[t];
    m.begun = false;
    ++m.commits;
    m.ends.push_back(m.issued);
  }

  static bool poisoned(const float* c, int columns) {
    for (int i = 0; i < columns / 2; ++i) {
      uint32_t bits;
      memcpy(&bits, c + i, 4);
      if (bits != kPoison) return false;
    }
    return true;
  }

  Held* find_held(Member& m, float* c, int columns) {
    for (Held& h : m.held) {
      if (h.c == c && h.sum->columns == columns) return &h;
      if (h.c < c + columns / 2 && c < h.c + h.sum->columns / 2)
        fail("a product on a part of the accumulators of another");
    }
    return nullptr;
  }

  void issue(int t, float* c, const Product& p, const uint32_t* a) {
    Member& m = members[t];
    if (!m.begun) fail("a product without begin_products() since the last commit_products()");
    const size_t at = size_t(m.issued++ - performed);
    Held* held = find_held(m, c, p.columns);
    if (held && !poisoned(c, p.columns)) fail("accumulators changed while their product ran");
    if (at == products.size()) {
      products.push_back(p);
      Product& made = products.back();
      made.group = m.commits;
      made.sum = held ? held->sum : std::make_shared<Accumulator>();
      made.sum->columns = p.columns;
    }
    Product& product = products[at];
    if (product.half != p.half || product.add != p.add || product.from_registers != p.from_registers ||
        product.columns != p.columns || product.a != p.a || product.b != p.b || product.group != m.commits ||
        (held && held->sum != product.sum))
      fail("a product that is another one than for other threads of the warp group");
    if (held) {
      held->group = m.commits;
    } else {
      const uint32_t poison = kPoison;
      for (int i = 0; i < p.columns / 2; ++i) {
        if (p.add) product.sum->values[row_of(t, i)][column_of(t, i)] = c[i];
        memcpy(c + i, &poison, 4);
      }
      m.held.push_back({c, product.sum, m.commits});
    }
    product.registers[t] = a;
    if (a) m.held_a.push_back({a, {a[0], a[1], a[2], a[3]}, m.commits});
    if (++product.issued == kGroup && pace.at_once) perform(0);
  }

  // How many products must be performed so that at most `pending_groups` groups are running.
  uint64_t needed(int t, int pending_groups) const {
    const Member& m = members[t];
    return m.commits > uint64_t(pending_groups) ? m.ends[m.commits - uint64_t(pending_groups) - 1] : 0;
  }

  // After a wait: the registers of completed groups belong to the thread again.
  void retire(int t, int pending_groups) {
    Member& m = members[t];
    const uint64_t running = m.commits > uint64_t(pending_groups) ? m.commits - uint64_t(pending_groups) : 0;
    for (const HeldA& h : m.held_a)
      if (h.group < running && memcmp(h.a, h.values, sizeof h.values))
        fail("registers of A changed while their product ran");
    m.held_a.erase(
        std::remove_if(m.held_a.begin(), m.held_a.end(), [&](const HeldA& h) { return h.group < running; }),
        m.held_a.end());
    for (const Held& h : m.held) {
      if (h.group >= running) continue;
      if (!poisoned(h.c, h.sum->columns)) fail("accumulators changed while their product ran");
      for (int i = 0; i < h.sum->columns / 2; ++i) h.c[i] = h.sum->values[row_of(t, i)][column_of(t, i)];
    }
    m.held.erase(
        std::remove_if(m.held.begin(), m.held.end(), [&](const Held& h) { return h.group < running; }),
        m.held.end());
  }

  // Execution.

  int pending() const override { return !products.empty() && products.front().issued == kGroup; }
  int willing() const override { return pending() && !unwilling; }
  std::string in_flight() const override {
    return products.empty() ? ""
                            : std::to_string(products.size()) + " products of threads from " +
                                  std::to_string(first_thread);
  }

  // An operand of `rows` x 16, contiguous along the 16 -> to[k * across + r * along].
  void load_rows(uint64_t bits, int rows, Decode decode, float* to, int across, int along) {
    const Descriptor d(bits);
    if (d.start % 1024 >= kRow || d.start % kRow + 2 * kSummed > kRow)
      fail("an operand that starts at offset %u", d.start - kBase);
    for (int r = 0; r < rows; ++r) {
      for (int half = 0; half < 2; ++half) {
        const uint32_t address = d.start + uint32_t(r / 8) * d.stride + uint32_t(r % 8 * kRow + half * 16);
        uint16_t chunk[8];
        memcpy(chunk, memory.at(swizzle(address), 16, "an operand"), 16);
        for (int i = 0; i < 8; ++i) to[(half * 8 + i) * across + r * along] = decode(chunk[i]);
      }
    }
  }
  // An operand of 16 x columns, contiguous along the columns -> to[k][n].
  void load_columns(uint64_t bits, int columns, Decode decode, float (*to)[kMostColumns]) {
    const Descriptor d(bits);
    if (d.start % 1024) fail("an operand that starts at offset %u, no multiple of 1024", d.start - kBase);
    if (columns > 64 && d.step % 1024) fail("a descriptor whose step of %u is no multiple of 1024", d.step);
    for (int k = 0; k < kSummed; ++k) {
      for (int n = 0; n < columns; n += 8) {
        const uint32_t address = d.start + uint32_t(k / 8) * d.stride + uint32_t(k % 8 * kRow + n % 64 * 2) +
                                 uint32_t(n / 64) * d.step;
        uint16_t chunk[8];
        memcpy(chunk, memory.at(swizzle(address), 16, "an operand"), 16);
        for (int i = 0; i < 8; ++i) to[k][n + i] = decode(chunk[i]);
      }
    }
  }

  void perform(int) override {
    static float a[kRowsOfProduct][kSummed];
    alignas(64) static float b[kSummed][kMostColumns];
    const Product p = products.front();
    products.pop_front();
    ++performed;
    unwilling = random.chance(pace.unwilling);
    const Decode decode = p.half ? decode_half : decode_bfloat;
    if (p.from_registers) {
      for (int t = 0; t < kGroup; ++t)
        for (int i = 0; i < 8; ++i)
          a[row_of(t, i)][column_of(t, i)] = decode(uint16_t(p.registers[t][i / 2] >> 16 * (i % 2)));
      load_columns(p.b, p.columns, decode, b);
    } else {
      load_rows(p.a, kRowsOfProduct, decode, a[0], 1, kSummed);
      load_rows(p.b, p.columns, decode, b[0], kMostColumns, 1);
    }
    for (int m = 0; m < kRowsOfProduct; ++m) {
      for (int n = 0; n < p.columns; n += 16) {
        Lanes* c = reinterpret_cast<Lanes*>(&p.sum->values[m][n]);
        Lanes sum = p.add ? *c : Lanes{};
        for (int k = 0; k < kSummed; ++k) sum += a[m][k] * *reinterpret_cast<const Lanes*>(&b[k][n]);
        *c = sum;
      }
    }
  }

  static float decode_bfloat(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
  }
  static float decode_half(uint16_t x) {
    static const std::vector<float> all = [] {
      std::vector<float> values(65536);
      for (int i = 0; i < 65536; ++i) {
        const int exponent = i >> 10 & 31, mantissa = i & 1023;
        double y =
            exponent ? __builtin_ldexp(1024 + mantissa, exponent - 25) : __builtin_ldexp(mantissa, -24);
        if (exponent == 31) y = mantissa ? __builtin_nan("") : __builtin_inf();
        values[size_t(i)] = float(i >> 15 ? -y : y);
      }
      return values;
    }();
    return all[x];
  }
};

}  // namespace flashbrush::emulation
