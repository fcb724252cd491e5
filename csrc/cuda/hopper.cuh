// Hopper's instructions that CUDA C++ has no functions for, one in each function: barriers in shared memory,
// copies of tiles, products of a warp group, registers moved between warp groups. Source: PTX ISA 8.0 and
// later, chapters mbarrier, cp.async.bulk.tensor, wgmma, setmaxnreg.
//
// A tile in shared memory has rows of 128 bytes (64 elements), swizzled in aligned units of eight rows: chunk
// c of 16 bytes of row r is at c ^ (r % 8). A wider tile is several such tiles, one after another.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define FB_INLINE __device__ __forceinline__
#define FB_DEVICE static FB_INLINE

namespace flashbrush {

using bfloat16 = __nv_bfloat16;
using float16 = __half;
using TensorMap = CUtensorMap;
using Barrier = uint64_t;

// Threads.

FB_DEVICE int thread_index() {
  return int(threadIdx.x);
}
FB_DEVICE int block_index() {
  return int(blockIdx.x);
}
FB_DEVICE int block_count() {
  return int(gridDim.x);
}
FB_DEVICE void sync_block() {
  __syncthreads();
}
// A barrier of `threads` threads, a multiple of 32, which all pass the same id in 1 .. 15.
FB_DEVICE void sync_some(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FB_DEVICE void arrive_some(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FB_DEVICE float shuffle_xor(float x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
FB_DEVICE int shuffle_xor(int x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
FB_DEVICE void sync_warp() {
  __syncwarp();
}
FB_DEVICE bool any_of_warp(bool x) {
  return __any_sync(0xffffffffu, x);
}
FB_DEVICE uint32_t votes_of_warp(bool x) {
  return __ballot_sync(0xffffffffu, x);
}
FB_DEVICE int count_bits(uint32_t x) {
  return __popc(x);
}
// The value of lane 0. The compiler then knows that it is the same in all lanes.
FB_DEVICE int uniform(int x) {
  return __shfl_sync(0xffffffffu, x, 0);
}
// Sets the registers of each thread of a warp group; all of its four warps call it.
template <int COUNT>
FB_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
FB_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Shared memory.

extern __shared__ __align__(1024) char flashbrush_shared[];
FB_DEVICE char* shared_memory() {
  return flashbrush_shared;
}
FB_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

FB_DEVICE void init_barrier(Barrier* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals));
}
// Makes initialised barriers visible to the copy engine. sync_block() must follow.
FB_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
FB_DEVICE void arrive(Barrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
// Arrives, and keeps the phase open until so many bytes were copied.
FB_DEVICE void arrive_expecting(Barrier* b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity is complete. The first phase has parity 0; a new barrier passes a wait
// for 1.
FB_DEVICE void wait(Barrier* b, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra passed;\n"
      "bra again;\n"
      "passed:\n"
      "}\n" ::"r"(shared_address(b)),
      "r"(parity)
      : "memory");
}

FB_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Starts a copy of 64 elements from `column` on, of the map's number of rows from `row` on, of one head and
// item, to `to`, swizzled. Elements outside the tensor become zeros.
FB_DEVICE void copy_tile(void* to, const TensorMap* map, Barrier* b, int column, int row, int head,
                         int item) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(b)), "r"(column), "r"(row), "r"(head), "r"(item)
      : "memory");
}
// Makes ordinary stores to shared memory visible to copies and products. A barrier of the threads must
// follow.
FB_DEVICE void publish_stores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Numbers.

FB_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FB_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FB_DEVICE float maximum(float a, float b) {
  return fmaxf(a, b);
}
FB_DEVICE float maximum_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
FB_DEVICE float bits_to_float(int x) {
  return __int_as_float(x);
}
FB_DEVICE int float_to_bits(float x) {
  return __float_as_int(x);
}

// Two numbers rounded to 16 bits, `low` in the low half.
template <typename T>
FB_DEVICE uint32_t pack(float low, float high);
template <>
FB_INLINE uint32_t pack<bfloat16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
FB_INLINE uint32_t pack<float16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// Products.

// The descriptor of an operand in shared memory, swizzled as above; `stride` and `step` are bytes. If it is
// contiguous along the summed dimension, `stride` is from eight rows to the next eight and `step` is not
// used. If across it, `stride` is from eight summed rows to the next eight and `step` from one tile of 64
// columns to the next.
FB_DEVICE uint64_t operand(const void* p, int step, int stride) {
  return uint64_t((shared_address(p) & 0x3ffff) >> 4) | uint64_t(step >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}
// The same operand, `bytes` further on.
FB_DEVICE uint64_t advance(uint64_t operand, int bytes) {
  return operand + uint64_t(bytes >> 4);
}

// Orders register writes before the products that follow.
FB_DEVICE void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Ends a group of products.
FB_DEVICE void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most PENDING groups of products are running.
template <int PENDING>
FB_DEVICE void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the computation of x, which is >= 0 or NaN, before a wait that follows. The assembler moves a wait
// for products up past code that does not touch their registers, but not past a branch that depends on x.
// This branch is always taken.
FB_DEVICE void finish(float x) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "setp.geu.f32 done, %0, 0f00000000;\n"
      "@done bra finished;\n"
      "nanosleep.u32 0;\n"
      "finished:\n"
      "}\n" ::"f"(x)
      : "memory");
}
// Keeps the compiler from moving accesses to these registers across this point.
template <int COUNT>
FB_DEVICE void pin(float (&x)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int COUNT>
FB_DEVICE void pin(uint32_t (&x)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// Registers of a product. c, 64 x N: c[4 j + 2 i + e] of lane t of warp w is element (16 w + t / 4 + 8 i,
// 8 j + 2 (t % 4) + e). a, 64 x 16: a[2 j + i] holds elements (16 w + t / 4 + 8 i, 8 j + 2 (t % 4) + {0, 1}).
// Lists of N registers for the text of an instruction, and as its operands.
// clang-format off
#define FB_TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define FB_FIRST_TEN "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9"
#define FB_FORTY FB_FIRST_TEN "," FB_TEN(1) "," FB_TEN(2) "," FB_TEN(3)
#define FB_REGISTERS_32 FB_FIRST_TEN "," FB_TEN(1) "," FB_TEN(2) ",%30,%31"
#define FB_REGISTERS_40 FB_FORTY
#define FB_REGISTERS_64 FB_FORTY "," FB_TEN(4) "," FB_TEN(5) ",%60,%61,%62,%63"
#define FB_REGISTERS_80 FB_FORTY "," FB_TEN(4) "," FB_TEN(5) "," FB_TEN(6) "," FB_TEN(7)
#define FB_REGISTERS_88 FB_REGISTERS_80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define FB_REGISTERS_96 FB_REGISTERS_80 "," FB_TEN(8) ",%90,%91,%92,%93,%94,%95"
#define FB_FOUR(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define FB_EIGHT(c, i) FB_FOUR(c, i), FB_FOUR(c, i + 4)
#define FB_OPERANDS_32(c) FB_EIGHT(c, 0), FB_EIGHT(c, 8), FB_EIGHT(c, 16), FB_EIGHT(c, 24)
#define FB_OPERANDS_40(c) FB_OPERANDS_32(c), FB_EIGHT(c, 32)
#define FB_OPERANDS_64(c) FB_OPERANDS_40(c), FB_EIGHT(c, 40), FB_EIGHT(c, 48), FB_EIGHT(c, 56)
#define FB_OPERANDS_80(c) FB_OPERANDS_64(c), FB_EIGHT(c, 64), FB_EIGHT(c, 72)
#define FB_OPERANDS_88(c) FB_OPERANDS_80(c), FB_EIGHT(c, 80)
#define FB_OPERANDS_96(c) FB_OPERANDS_88(c), FB_EIGHT(c, 88)
// clang-format on

// c = a b, or c += a b: a of 64 x 16 and b of 16 x N, both contiguous along the summed dimension.
template <typename T, int N>
FB_DEVICE void multiply(float (&c)[N / 2], uint64_t a, uint64_t b, bool add);
// c += a b: b of 16 x N contiguous across the summed dimension.
template <typename T, int N>
FB_DEVICE void multiply(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add);

// Both forms for one TYPE and N, whose c has COUNT registers. The others are the numbers of the operands in
// the text: A, B and P (add or not) of the first form, A0 .. A3, RB and RP of the second.
#define FB_MULTIPLY(TYPE, NAME, N, COUNT, A, B, P, A0, A1, A2, A3, RB, RP)                                 \
  template <>                                                                                              \
  FB_INLINE void multiply<TYPE, N>(float (&c)[N / 2], uint64_t a, uint64_t b, bool add) {                  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N      \
                 "k16.f32." NAME "." NAME " {" FB_REGISTERS_##COUNT "}, %" #A ", %" #B                     \
                                                                    ", p, 1, 1, 0, 0;\n}\n"                \
                 : FB_OPERANDS_##COUNT(c)                                                                  \
                 : "l"(a), "l"(b), "r"(int(add)));                                                         \
  }                                                                                                        \
  template <>                                                                                              \
  FB_INLINE void multiply<TYPE, N>(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {      \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #RP ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N     \
                 "k16.f32." NAME "." NAME " {" FB_REGISTERS_##COUNT "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 \
                                                                    "}, %" #RB ", p, 1, 1, 1;\n}\n"        \
                 : FB_OPERANDS_##COUNT(c)                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));                     \
  }
#define FB_MULTIPLY_BOTH(...) \
  FB_MULTIPLY(bfloat16, "bf16", __VA_ARGS__) FB_MULTIPLY(float16, "f16", __VA_ARGS__)
FB_MULTIPLY_BOTH(64, 32, 32, 33, 34, 32, 33, 34, 35, 36, 37)
FB_MULTIPLY_BOTH(80, 40, 40, 41, 42, 40, 41, 42, 43, 44, 45)
FB_MULTIPLY_BOTH(128, 64, 64, 65, 66, 64, 65, 66, 67, 68, 69)
FB_MULTIPLY_BOTH(160, 80, 80, 81, 82, 80, 81, 82, 83, 84, 85)
FB_MULTIPLY_BOTH(176, 88, 88, 89, 90, 88, 89, 90, 91, 92, 93)
FB_MULTIPLY_BOTH(192, 96, 96, 97, 98, 96, 97, 98, 99, 100, 101)

}  // namespace flashbrush
