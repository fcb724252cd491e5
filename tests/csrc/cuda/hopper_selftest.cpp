// Small kernels that use the emulated functions one by one, and kernels with one mistake each.
#include "hopper_emulated.h"

using namespace flashbrush;

namespace {

constexpr int kBarriers = 1024;  // bytes before the tiles
constexpr int kRows = 64;

FB_DEVICE int row_of(int i) {
  return 16 * (thread_index() / 32) + thread_index() % 32 / 4 + 8 * (i / 2 % 2);
}
FB_DEVICE int column_of(int i) {
  return 8 * (i / 4) + 2 * (thread_index() % 4) + i % 2;
}

// Operand of step s, 16 of the summed dimension, of a tile of `rows` rows.
FB_DEVICE uint64_t step_of(uint64_t tile, int s, int rows) {
  return advance(tile, s / 4 * rows * 128 + s % 4 * 32);
}

// Stores two neighbours of a row in a swizzled tile, or in several tiles of 64 columns.
template <typename T>
FB_DEVICE void store_pair(char* tile, int rows, int row, int column, float a, float b) {
  char* block = tile + column / 64 * rows * 128 + row * 128;
  *reinterpret_cast<uint32_t*>(block + ((column % 64 / 8) ^ row % 8) * 16 + column % 8 * 2) = pack<T>(a, b);
}

// q k^T, and the result stored as an operand in the memory of q.

struct Rows {
  TensorMap q, k;
  int row, head, item;
  float* out;         // (64, N)
  uint16_t* rounded;  // the same after a way through the memory of q; N <= D
};

template <typename T, int D, int N>
__global__ void multiply_rows(const __grid_constant__ Rows p) {
  char* shared = shared_memory();
  auto* full = reinterpret_cast<Barrier*>(shared);
  char *q = shared + kBarriers, *k = q + kRows * D * 2;
  if (thread_index() == 0) {
    prefetch_map(&p.q);
    init_barrier(full, 1);
    publish_barriers();
  }
  sync_block();
  if (thread_index() == 0) {
    arrive_expecting(full, (kRows + N) * D * 2);
    for (int block = 0; block < D / 64; ++block) {
      copy_tile(q + block * kRows * 128, &p.q, full, 64 * block, 0, 0, 0);
      copy_tile(k + block * N * 128, &p.k, full, 64 * block, p.row, p.head, p.item);
    }
  }
  wait(full, 0);
  float c[N / 2];
  begin_products();
  for (int s = 0; s < D / 16; ++s)
    multiply<T, N>(c, step_of(operand(q, 0, 1024), s, kRows), step_of(operand(k, 0, 1024), s, N), s > 0);
  commit_products();
  await_products<0>();
  pin(c);
  for (int i = 0; i < N / 2; ++i) p.out[row_of(i) * N + column_of(i)] = c[i];
  if (N > D) return;

  for (int i = 0; i < N / 2; i += 2) store_pair<T>(q, kRows, row_of(i), column_of(i), c[i], c[i + 1]);
  publish_stores();
  sync_some(1, 128);
  for (int i = thread_index(); i < kRows * N; i += 128) {
    const int r = i / N, n = i % N;
    p.rounded[i] = *reinterpret_cast<uint16_t*>(q + n / 64 * kRows * 128 + r * 128 +
                                                ((n % 64 / 8) ^ r % 8) * 16 + n % 8 * 2);
  }
}

template <typename T, int D, int N>
int run_rows(const Rows& p) {
  return launch(multiply_rows<T, D, N>, p, 1, 128, kBarriers + (kRows + N) * D * 2, nullptr);
}

template <typename T>
int select_rows(const Rows& p, int dim, int columns) {
  // clang-format off
#define FB_CASE(D, N) if (dim == D && columns == N) return run_rows<T, D, N>(p);
  FB_CASE(64, 64) FB_CASE(64, 128) FB_CASE(64, 176) FB_CASE(64, 192)
  FB_CASE(128, 64) FB_CASE(128, 128) FB_CASE(128, 176) FB_CASE(128, 192)
#undef FB_CASE
      // clang-format on
      return -1;
}

// a v, with a in registers.

struct Columns {
  TensorMap v;
  const float* a;  // (64, S)
  float* out;      // (64, N)
};

template <typename T, int S, int N>
__global__ void multiply_columns(const __grid_constant__ Columns p) {
  char* shared = shared_memory();
  auto* full = reinterpret_cast<Barrier*>(shared);
  char* v = shared + kBarriers;
  if (thread_index() == 0) {
    init_barrier(full, 1);
    publish_barriers();
  }
  sync_block();
  if (thread_index() == 0) {
    arrive_expecting(full, S * N * 2);
    for (int block = 0; block < N / 64; ++block)
      copy_tile(v + block * S * 128, &p.v, full, 64 * block, 0, 0, 0);
  }
  uint32_t a[S / 16][4];
  for (int s = 0; s < S / 16; ++s)
    for (int i = 0; i < 4; ++i) {
      const float* from = p.a + row_of(2 * i) * S + 16 * s + column_of(2 * i);
      a[s][i] = pack<T>(from[0], from[1]);
    }
  // Two groups of products at once: the first three steps, and the others.
  float c[N / 2], d[N / 2];
  for (float& x : c) x = 1;
  wait(full, 0);
  begin_products();
  for (int s = 0; s < 3; ++s) multiply<T, N>(c, a[s], advance(operand(v, S * 128, 1024), s * 2048), true);
  commit_products();
  begin_products();
  for (int s = 3; s < S / 16; ++s)
    multiply<T, N>(d, a[s], advance(operand(v, S * 128, 1024), s * 2048), s > 3);
  commit_products();
  await_products<1>();
  pin(c);
  for (float& x : c) x += 1;
  await_products<0>();
  pin(d);
  for (int i = 0; i < N / 2; ++i) p.out[row_of(i) * N + column_of(i)] = c[i] + d[i];
}

template <typename T, int N>
int run_columns(const Columns& p) {
  return launch(multiply_columns<T, 80, N>, p, 1, 128, kBarriers + 80 * N * 2, nullptr);
}

// The sum of q k^T over tiles of k that pass through two buffers: one producer, two consumers.

enum Mistake {
  NONE,
  NO_AWAIT,
  EARLY_RELEASE,
  NO_WAIT,
  NO_COPY,
  OTHER_COUNT,
  FEWER_BYTES,
  EARLY_READ,
  EARLY_WRITE,
  EARLY_OPERAND,
  EXTRA_COPY,
  NO_COMMIT,
  OTHER_OPERAND,
  OUT_OF_BOUNDS,
  TOO_MANY_REGISTERS,
  HALF_A_WARP
};

struct Ring {
  TensorMap q, k;
  int tiles, mistake;
  float* out;  // (blocks, 2, 64, 64), the sum over tiles of q k'; rows of q are 64 x (2 block + consumer)
};

constexpr int kStages = 2, kTile = 64 * 128, kDim = 64;
constexpr int kRing = 2 + kStages + 1;  // tiles: 2 of q, those of k, and one that only a mistake writes

__global__ void sum_tiles(const __grid_constant__ Ring p) {
  using T = bfloat16;
  char* shared = shared_memory();
  auto* full = reinterpret_cast<Barrier*>(shared);
  Barrier *empty = full + kStages, *loaded = empty + kStages;
  char *q = shared + kBarriers, *k = q + 2 * kTile;
  const int group = uniform(thread_index() / 128), mistake = p.mistake;
  if (thread_index() == 0) {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(full + s, 1);
      init_barrier(empty + s, 2);
    }
    init_barrier(loaded, 1);
    publish_barriers();
  }
  sync_block();
  if (group == 0) {
    give_registers<24>();
    if (thread_index() == 0) {
      arrive_expecting(loaded, 2 * kTile);
      for (int g = 0; g < 2; ++g)
        copy_tile(q + g * kTile, &p.q, loaded, 0, 64 * (2 * block_index() + g), 0, 0);
      for (int i = 0; i < p.tiles; ++i) {
        const int s = i % kStages;
        wait(empty + s, i / kStages % 2 ^ 1);
        arrive_expecting(full + s, mistake == FEWER_BYTES ? kTile - 128 : kTile);
        if (mistake == EXTRA_COPY && i == 1) copy_tile(q + (2 + kStages) * kTile, &p.k, loaded, 0, 0, 0, 0);
        if (mistake != NO_COPY || i + 1 < p.tiles) copy_tile(k + s * kTile, &p.k, full + s, 0, 64 * i, 0, 0);
      }
    }
    return;
  }
  if (mistake == TOO_MANY_REGISTERS)
    take_registers<248>();
  else
    take_registers<240>();
  char* mine = q + (group - 1) * kTile;
  float c[32], d[32];
  for (float& x : c) x = 0;
  wait(loaded, 0);
  for (int i = 0; i < p.tiles; ++i) {
    const int s = i % kStages;
    if (mistake != NO_WAIT) wait(full + s, i / kStages % 2);
    begin_products();
    for (int j = 0; j < kDim / 16; ++j) {
      const int step = mistake == OTHER_OPERAND && thread_index() % 128 == 77 ? 0 : j;
      multiply<T, 64>(d, step_of(operand(mine, 0, 1024), step, 64),
                      step_of(operand(k + s * kTile, 0, 1024), j, 64), j > 0);
    }
    commit_products();
    if (mistake == EARLY_WRITE && i == 1) d[3] += 1;
    if (mistake == EARLY_READ) c[5] += d[5];
    if (mistake == EARLY_RELEASE && thread_index() % 128 == 0) arrive(empty + s);
    if (mistake != NO_AWAIT) await_products<0>();
    pin(d);
    if (mistake != EARLY_RELEASE && thread_index() % 128 == 0) arrive(empty + s);
    for (int e = 0; e < 32; ++e) c[e] += d[e];
  }
  if (mistake == NO_AWAIT) await_products<0>();

  // The sum is stored as an operand and multiplied by the unit matrix.
  for (int i = 0; i < 32; i += 2) store_pair<T>(mine, 64, row_of(i) % 64, column_of(i), c[i], c[i + 1]);
  publish_stores();
  if (mistake != HALF_A_WARP || thread_index() % 32 < 16)
    sync_some(group, mistake == OTHER_COUNT && thread_index() % 128 < 64 ? 96 : 128);
  uint32_t ones[4][4];
  for (int s = 0; s < 4; ++s)
    for (int i = 0; i < 4; ++i)
      ones[s][i] = pack<T>(row_of(2 * i) % 64 == 16 * s + column_of(2 * i),
                           row_of(2 * i) % 64 == 16 * s + column_of(2 * i) + 1);
  begin_products();
  for (int s = 0; s < 4; ++s) multiply<T, 64>(d, ones[s], advance(operand(mine, 0, 1024), s * 2048), s > 0);
  if (mistake == EARLY_OPERAND) ones[1][2] ^= 1;
  if (mistake != NO_COMMIT) commit_products();
  await_products<0>();
  float largest = 0;
  for (float x : d) largest = maximum(largest, x);
  for (int mask = 1; mask < 32; mask *= 2) largest = maximum(largest, shuffle_xor(largest, mask));
  if (!any_of_warp(float_to_bits(d[0]) >= 0 && d[0] == largest) && largest < 0) return;
  for (int i = 0; i < 32; ++i)
    p.out[((2 * block_index() + group - 1) * 64 + row_of(i) % 64) * 64 + column_of(i)] = d[i];
  if (mistake == OUT_OF_BOUNDS && thread_index() == 200) shared[kBarriers + kRing * kTile + 3] = 0;
}

}  // namespace

extern "C" {

int selftest_rows(int half, int dim, int columns, const void* q, const void* k, int64_t rows, int row,
                  int head, int item, float* out, uint16_t* rounded) {
  Rows p{{}, {}, row, head, item, out, rounded};
  if (!make_map(&p.q, half, q, kRows, 1, 1, dim, dim * 2, dim * 2, dim * 2, kRows)) return -1;
  if (!make_map(&p.k, half, k, rows, 2, 2, dim, dim * 4, dim * 2, rows * dim * 4, columns)) return -1;
  return half ? select_rows<float16>(p, dim, columns) : select_rows<bfloat16>(p, dim, columns);
}

int selftest_columns(int half, int columns, const float* a, const void* v, float* out) {
  Columns p{{}, a, out};
  if (!make_map(&p.v, half, v, 80, 1, 1, columns, columns * 2, columns * 2, columns * 2, 80)) return -1;
  if (columns == 64) return half ? run_columns<float16, 64>(p) : run_columns<bfloat16, 64>(p);
  if (columns == 128) return half ? run_columns<float16, 128>(p) : run_columns<bfloat16, 128>(p);
  if (columns == 192) return half ? run_columns<float16, 192>(p) : run_columns<bfloat16, 192>(p);
  return -1;
}

int selftest_ring(int mistake, int blocks, int tiles, const void* q, const void* k, float* out) {
  Ring p{{}, {}, tiles, mistake, out};
  if (!make_map(&p.q, false, q, 128 * blocks, 1, 1, kDim, 128, 128, 128, 64)) return -1;
  if (!make_map(&p.k, false, k, 64 * tiles, 1, 1, kDim, 128, 128, 128, 64)) return -1;
  return launch(sum_tiles, p, blocks, 384, kBarriers + kRing * kTile, nullptr);
}

int selftest_map(int64_t base, int64_t rows, int64_t row_stride, int box_rows) {
  TensorMap map;
  return make_map(&map, false, reinterpret_cast<const void*>(base), rows, 1, 1, 64, row_stride, 128, 128,
                  box_rows);
}

uint32_t selftest_round(int half, float x) {
  return half ? pack<float16>(x, 0) : pack<bfloat16>(x, 0);
}
}
