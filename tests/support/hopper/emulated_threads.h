// The threads of one block on the CPU: a fiber each, all on one thread of the machine, so that nothing
// happens between two switches. A scheduler draws which warp runs next, and which copies and products are
// performed meanwhile.
#pragma once
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace flashbrush::emulation {

constexpr int kWarp = 32, kGroup = 128, kMostThreads = 1024;
constexpr size_t kStack = 256 << 10,
                 kGuard = 64 << 10;  // bytes of a fiber's stack; accesses to the guard below fault

// Errors that launch() returns.
constexpr int kMisuse = 1, kDeadlock = 2;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  char text[512];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  throw Failure(text);
}

// The generator splitmix64.
struct Random {
  uint64_t state = 0;
  uint64_t next() {
    uint64_t x = state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
  }
  int below(int n) { return int((next() >> 32) * uint64_t(n) >> 32); }
  bool chance(double p) { return double(next() >> 11) * 0x1p-53 < p; }
};

// Fibers.

#if defined(__x86_64__)
using Context = void*;
#if defined(__clang__)
#define FB_OPAQUE noinline
#else
#define FB_OPAQUE noipa
#endif
// Pushes the registers that a called function must preserve; the caller saves the others. Opaque to the
// compiler, since all memory may change meanwhile.
__attribute__((naked, FB_OPAQUE)) inline void switch_context(Context*, Context*) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq (%rsi), %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
inline void make_context(Context* context, char* stack, void (*entry)()) {
  // At a function's entry the stack pointer is 8 above a multiple of 16, and points to the return address.
  auto* top = reinterpret_cast<void**>(stack + kStack) - 2;
  top[1] = nullptr;
  top[0] = reinterpret_cast<void*>(entry);
  for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
  *context = top - 6;
}
#else
using Context = ucontext_t;
inline void switch_context(Context* from, Context* to) {
  swapcontext(from, to);
}
inline void make_context(Context* context, char* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStack;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
#endif

inline char* stack_of(int thread) {
  static char* const all = [] {
    const size_t size = (kStack + kGuard) * kMostThreads;
    void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) fail("no memory for the stacks");
    for (int i = 0; i < kMostThreads; ++i)
      mprotect(static_cast<char*>(p) + (kStack + kGuard) * i, kGuard, PROT_NONE);
    return static_cast<char*>(p);
  }();
  return all + (kStack + kGuard) * thread + kGuard;
}

// Threads.

struct Thread {
  int index = 0;
  Context context{};
  bool finished = false, waiting = false;
  std::function<bool()> ready;  // whether a waiting thread can go on
  std::function<std::string()> waiting_for;
};

// Where the 32 threads of a warp meet. Values of a meeting stay until the next but one, which no thread
// reaches before all have read them.
struct Warp {
  const char* meeting = nullptr;
  uint64_t detail = 0, meetings = 0;
  int arrived = 0;
  struct Slot {
    uint64_t address;
    uint32_t words[4];
  } slots[2][kWarp];
  uint64_t result[2] = {};
};

// Operations beside the threads: copies, and the products of a warp group. Of the `pending` ones the first
// `willing` may be performed at any time; the others only when nothing else can happen.
struct Engine {
  virtual ~Engine() = default;
  virtual int pending() const = 0;
  virtual int willing() const = 0;
  virtual void perform(int which) = 0;
  virtual std::string in_flight() const = 0;
};

// When an engine performs its operations: at once, only when no thread can go on, or with some chance at
// every step.
struct Pace {
  bool at_once = false;
  double chance = 0, unwilling = 0;
  void draw(Random& random) {
    static const double kChances[] = {0.02, 0.1, 0.4};
    const int kind = random.below(4);
    at_once = kind == 0;
    chance = kind < 2 ? 0 : kChances[random.below(3)];
    unwilling = random.below(2) * 0.2;
  }
};

struct Scheduler {
  Random random;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> order;  // in which warps are tried; drawn anew at every step if `fair`, else rarely
  std::vector<std::pair<Engine*, Pace*>> engines;
  Thread* current = nullptr;
  Context outside{};
  std::function<void()> body;
  std::string failure;
  bool fair = true;

  Warp& warp() { return warps[size_t(current->index / kWarp)]; }
  int lane() const { return current->index % kWarp; }

  // The current thread waits until ready().
  template <typename Ready, typename Describe>
  void wait_until(Ready ready, Describe describe) {
    if (ready()) return;
    current->ready = ready;
    current->waiting_for = describe;
    current->waiting = true;
    switch_context(&current->context, &outside);
  }

  // Sometimes lets other threads run first.
  void pause() {
    if (random.below(8) == 0) switch_context(&current->context, &outside);
  }

  // All threads of a warp call this with the same operation. The last one completes it; then all go on.
  template <typename Complete>
  void meet(const char* operation, uint64_t detail, const Warp::Slot& slot, Complete complete) {
    Warp& w = warp();
    if (!w.arrived) {
      w.meeting = operation;
      w.detail = detail;
    } else if (strcmp(w.meeting, operation) || w.detail != detail) {
      fail("%s, while others of the warp are at %s, or at another operand", operation, w.meeting);
    }
    const uint64_t meeting = w.meetings;
    w.slots[meeting & 1][lane()] = slot;
    if (++w.arrived < kWarp) {
      wait_until([&w, meeting] { return w.meetings != meeting; },
                 [operation] { return std::string(operation) + ": the rest of the warp"; });
    } else {
      w.arrived = 0;
      ++w.meetings;
      complete(w, w.slots[meeting & 1], &w.result[meeting & 1]);
    }
  }

  static Scheduler*& active() {
    static Scheduler* scheduler = nullptr;
    return scheduler;
  }

  static void enter() {
    Scheduler& s = *active();
    try {
      s.body();
    } catch (const std::exception& e) {
      s.failure = "thread " + std::to_string(s.current->index) + ": " + e.what();
    }
    s.current->finished = true;
    switch_context(&s.current->context, &s.outside);
    abort();
  }

  bool can_go(Thread& t) {
    if (t.finished) return false;
    if (t.waiting && !t.ready()) return false;
    t.waiting = false;
    return true;
  }

  void resume(Thread& t) {
    current = &t;
    switch_context(&outside, &t.context);
    current = nullptr;
    if (!failure.empty()) throw Failure(failure);
  }

  // Runs the threads of a warp, each until it waits, over and over. Returns false if none could run.
  bool run_warp(int w) {
    bool ran = false;
    for (bool again = true; again;) {
      again = false;
      const int first = random.below(kWarp);
      for (int i = 0; i < kWarp; ++i) {
        Thread& t = threads[size_t(w * kWarp + (first + i) % kWarp)];
        if (!can_go(t)) continue;
        resume(t);
        ran = again = true;
      }
      if (again && random.below(4) == 0) break;
    }
    return ran;
  }

  bool perform_any() {
    for (const bool willing : {true, false}) {
      const auto count = [&](const Engine& e) { return willing ? e.willing() : e.pending(); };
      int all = 0;
      for (auto& [engine, pace] : engines) all += count(*engine);
      int which = random.below(all);
      for (auto& [engine, pace] : engines) {
        if (which < count(*engine)) {
          engine->perform(which);
          return true;
        }
        which -= count(*engine);
      }
    }
    return false;
  }

  void shuffle_order() {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[size_t(random.below(int(i)))]);
  }

  std::string who_waits() const {
    std::string text;
    for (size_t i = 0, last; i < threads.size(); i = last + 1) {
      auto what = [&](size_t t) { return threads[t].finished ? "finished" : threads[t].waiting_for(); };
      const std::string first = what(i);
      for (last = i; last + 1 < threads.size() && what(last + 1) == first; ++last) {
      }
      text += "\n  threads " + std::to_string(i) + "-" + std::to_string(last) + ": " + first;
    }
    return text;
  }

  void start(int count, std::function<void()> each) {
    active() = this;
    body = std::move(each);
    threads = std::vector<Thread>(size_t(count));
    warps = std::vector<Warp>(size_t(count / kWarp));
    for (int i = 0; i < count; ++i) {
      threads[size_t(i)].index = i;
      make_context(&threads[size_t(i)].context, stack_of(i), enter);
    }
    for (int i = 0; i < count / kWarp; ++i) order.push_back(i);
    shuffle_order();
    fair = random.below(2) == 0;
    for (auto& [engine, pace] : engines) pace->draw(random);
  }

  // Runs each() on every thread. Returns 0, or an error with a message.
  int run(int count, std::function<void()> each, std::string* message) {
    try {
      start(count, std::move(each));
      // Operations in flight when all threads have finished stay there: no thread waited for them.
      while (std::any_of(threads.begin(), threads.end(), [](const Thread& t) { return !t.finished; })) {
        for (auto& [engine, pace] : engines)
          if (engine->willing() && random.chance(pace->chance))
            engine->perform(random.below(engine->willing()));
        if (fair || random.below(32) == 0) shuffle_order();
        bool ran = false;
        for (size_t i = 0; i < order.size() && !ran; ++i) ran = run_warp(order[i]);
        if (ran || perform_any()) continue;
        *message = "no thread can go on" + who_waits();
        return kDeadlock;
      }
      return 0;
    } catch (const Failure& e) {
      *message = e.what();
      return kMisuse;
    }
  }
};

}  // namespace flashbrush::emulation
