// Chooses the instruction set at run time.
#include <string.h>

#include "dispatch.h"

using namespace flashbrush;

extern "C" {
__attribute__((weak)) const Kernels* flashbrush_kernels_portable();
__attribute__((weak)) const Kernels* flashbrush_kernels_avx2();
__attribute__((weak)) const Kernels* flashbrush_kernels_avx512();
__attribute__((weak)) const Kernels* flashbrush_kernels_avx512bf16();
}

namespace {

struct Isa {
  const char* name;
  const Kernels* (*kernels)();
  bool (*supported)();
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512bf16() { return false; }
#endif
bool always() { return true; }

const Isa kIsas[] = {  // best first
    {"avx512bf16", flashbrush_kernels_avx512bf16, has_avx512bf16},
    {"avx512", flashbrush_kernels_avx512, has_avx512},
    {"avx2", flashbrush_kernels_avx2, has_avx2},
    {"portable", flashbrush_kernels_portable, always},
};

}  // namespace

const Kernels* flashbrush::find(const char* name) {
  for (const Isa& isa : kIsas)
    if (isa.kernels && isa.supported() && (!name || !*name || !strcmp(name, isa.name))) return isa.kernels();
  return nullptr;
}

FLASHBRUSH_EXPORT int flashbrush_abi() { return FLASHBRUSH_ABI; }

// Name of the i-th instruction set that is built in and runs here, best first; null after the last.
FLASHBRUSH_EXPORT const char* flashbrush_isa(int i) {
  for (const Isa& isa : kIsas)
    if (isa.kernels && isa.supported() && i-- == 0) return isa.name;
  return nullptr;
}
