// Chooses the instruction set at run time. An instruction set that was not built is a null weak symbol.
#include <string.h>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "schedule/dispatch.h"

using namespace flashbrush;

extern "C" {
__attribute__((weak)) const Kernels* flashbrush_kernels_portable();
__attribute__((weak)) const Kernels* flashbrush_kernels_avx2();
__attribute__((weak)) const Kernels* flashbrush_kernels_avx512();
__attribute__((weak)) const Kernels* flashbrush_kernels_avx512bf16();
__attribute__((weak)) const Kernels* flashbrush_kernels_amx();
}

namespace {

struct Isa {
  const char* name;
  const Kernels* (*kernels)();
  bool (*supported)();
  bool by_name_only;  // never the default
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
#else
bool has_avx2() {
  return false;
}
bool has_avx512() {
  return false;
}
bool has_avx512bf16() {
  return false;
}
#endif
#if defined(FLASHBRUSH_AMX_EMULATED)
bool has_amx() {
  return has_avx512();
}
#elif defined(__x86_64__) && defined(__linux__)
// Whether the processor has AMX with bfloat16, and Linux lets this process use it. Linux saves the tile
// registers only of a process that asked.
bool ask_for_amx() {
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;  // EDX of leaf 7
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  return has_avx512bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) && (d & kBf16) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
bool has_amx() {
  static const bool has = ask_for_amx();
  return has;
}
#else
bool has_amx() {
  return false;
}
#endif
bool always() {
  return true;
}

// Best first.
const Isa kIsas[] = {
    {"amx", flashbrush_kernels_amx, has_amx, true},  // tested on hardware, not yet timed
    {"avx512bf16", flashbrush_kernels_avx512bf16, has_avx512bf16, false},
    {"avx512", flashbrush_kernels_avx512, has_avx512, false},
    {"avx2", flashbrush_kernels_avx2, has_avx2, false},
    {"portable", flashbrush_kernels_portable, always, false},
};

}  // namespace

const Kernels* flashbrush::find(const char* name) {
  const bool any = !name || !*name;
  for (const Isa& isa : kIsas)
    if (isa.kernels && (any ? !isa.by_name_only : !strcmp(name, isa.name)) && isa.supported())
      return isa.kernels();
  return nullptr;
}

FLASHBRUSH_EXPORT int flashbrush_abi() {
  return FLASHBRUSH_ABI;
}

// The name of the i-th instruction set that is built in and runs here, best first; null after the last. It
// lists those too that are never the default.
FLASHBRUSH_EXPORT const char* flashbrush_isa(int i) {
  for (const Isa& isa : kIsas)
    if (isa.kernels && isa.supported() && i-- == 0) return isa.name;
  return nullptr;
}
