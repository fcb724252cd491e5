// What all schedulers use: the kernels of an instruction set, threads and aligned memory.
#pragma once
#include <stdlib.h>

#include <memory>
#include <thread>
#include <vector>

#include "kernels.h"

namespace flashbrush {

// The kernels of instruction set `name`; for null or "" the best that runs here. Null: there are none.
const Kernels* find(const char* name);

enum Status { kOk = 0, kNoIsa = 1, kNoMemory = 2, kOtherVersion = 3 };

// Runs worker(data) on `threads` threads, by the caller's `parallel` if there is one.
inline void run_parallel(FbParallel parallel, void (*worker)(void*), void* data, int threads) {
  if (threads <= 1) return worker(data);
  if (parallel) return parallel(worker, data, unsigned(threads), 0);
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; ++i) pool.emplace_back(worker, data);
  worker(data);
  for (std::thread& t : pool) t.join();
}

struct Free {
  void operator()(void* p) const { free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

// False: out of memory. The memory is not cleared.
inline bool allocate(Buffer& buffer, size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, bytes ? bytes : 64)) return false;
  buffer.reset((char*)p);
  return true;
}

}  // namespace flashbrush
