// Attention over segments on Hopper: a persistent kernel of three or four warp groups.
//
// In the first warp group one warp lists the key segments that a block of rows visits (block_work.cuh), and
// one starts the copies of Q and of tiles of K and V. The other warp groups own 64 rows each and take turns:
// the products of one run while another computes its softmax. Within a group, Q K^T of the next tile is
// started before P V of this one.
#pragma once
#include "softmax.cuh"

// 0 for a measurement without it: the assembler then waits for P V before the next tile's exponentials begin.
#ifndef FLASHBRUSH_OVERLAP
#define FLASHBRUSH_OVERLAP 1
#endif

namespace flashbrush {

// Ids of named barriers; 0 is sync_block's. Each has one id for each warp group that computes.
constexpr int kTurn = 1;   // 1 .. 3: between the group whose turn to start products it is and the one before
constexpr int kGroup = 4;  // 4 .. 6: among the threads of a group

constexpr int kGroupThreads = 128, kGroupWarps = 4;
constexpr int kStages = 2, kWorkBuffers = 2;

// D: head dim of the tiles; the copies fill a smaller one up with zeros. KEYS: keys of a tile. GROUPS: warp
// groups that compute. POLYNOMIAL: see softmax_tile. Offsets are bytes in shared memory.
template <typename T, int D_, int KEYS_, int GROUPS_, bool GROUPED_, int POLYNOMIAL_>
struct Kernel {
  using Type = T;
  static constexpr int D = D_, KEYS = KEYS_, GROUPS = GROUPS_, POLYNOMIAL = POLYNOMIAL_;
  static constexpr bool GROUPED = GROUPED_;  // several softmax groups
  static constexpr int ROWS = GROUPS * kGroupRows, WARPS = GROUPS * kGroupWarps,
                       THREADS = (GROUPS + 1) * kGroupThreads;
  // Registers of a thread, of the block's 65,536: the loading warp group gets few, the others the rest.
  static constexpr int LOAD_REGISTERS = GROUPS == 2 ? 40 : 32, REGISTERS = GROUPS == 2 ? 232 : 160;
  static constexpr int q_bytes = ROWS * D * 2, tile_bytes = KEYS * D * 2;
  static constexpr int k_offset = q_bytes, v_offset = k_offset + kStages * tile_bytes;
  static constexpr int works_offset = v_offset + kStages * tile_bytes;
  static constexpr int barriers_offset = works_offset + kWorkBuffers * int(sizeof(BlockWork));
  static constexpr int mass_offset = barriers_offset + 128;
  // For a mass: sum and maximum of each (segment, row), then the sums over the rows of each warp.
  static int shared_bytes(const FbGpuAttention& call) {
    return mass_offset + (call.partial_mass ? call.C * (2 * ROWS + WARPS) * int(sizeof(float)) : 0);
  }
};

struct Barriers {
  Barrier q_full, q_empty, work_full[kWorkBuffers], work_empty[kWorkBuffers], k_full[kStages],
      k_empty[kStages], v_full[kStages], v_empty[kStages];
};
static_assert(sizeof(Barriers) <= 128, "the room that Kernel gives them");

// An index in a ring of SIZE buffers, and the parity of their barriers, which flips with each turn of the
// ring.
template <int SIZE>
struct Ring {
  int at = 0;
  uint32_t parity = 0;
  FB_INLINE void next() {
    if (++at == SIZE) at = 0, parity ^= 1;
  }
};

// Describes the work of each block of rows one block ahead; run by one warp.
template <typename K>
FB_DEVICE void describe_blocks(const Parameters& p, BlockWork* works, Barriers* bars, int lane) {
  Ring<kWorkBuffers> work;
  for (int n = block_index(); n < p.count; n += block_count(), work.next()) {
    wait(&bars->work_empty[work.at], work.parity ^ 1);
    describe_block(p, n, K::ROWS, lane, works + work.at);
    arrive(&bars->work_full[work.at]);
  }
}

// Copies ROWS rows, 64 columns at a time. Columns beyond the head dim become zeros.
template <typename K, int ROWS>
FB_DEVICE void copy_rows(char* to, const TensorMap* map, Barrier* full, int row, int head, int item) {
  arrive_expecting(full, ROWS * K::D * 2);
  for (int block = 0; block < K::D / 64; ++block)
    copy_tile(to + block * ROWS * 128, map, full, 64 * block, row, head, item);
}

// Starts all copies; run by one thread. K is one tile ahead of V, as in the products.
template <typename K>
FB_DEVICE void load_tiles(const Parameters& p, char* shared, const BlockWork* works, Barriers* bars) {
  using Tiles = Cursor<K::KEYS>;
  Ring<kWorkBuffers> work;
  Ring<kStages> k, v;
  Ring<1> q;
  const int heads_per_kv = p.call.H / p.call.Hkv;
  for (int n = block_index(); n < p.count; n += block_count(), work.next(), q.next()) {
    wait(&bars->work_full[work.at], work.parity);
    const BlockWork* todo = works + work.at;
    const int head = todo->h / heads_per_kv;
    auto load_k = [&](const Tiles& tile) {
      wait(&bars->k_empty[k.at], k.parity ^ 1);
      copy_rows<K, K::KEYS>(shared + K::k_offset + k.at * K::tile_bytes, &p.k[tile.visit->tensor],
                            &bars->k_full[k.at], tile.row(), head, tile.visit->item_k);
      k.next();
    };
    auto load_v = [&](const Tiles& tile) {
      wait(&bars->v_empty[v.at], v.parity ^ 1);
      copy_rows<K, K::KEYS>(shared + K::v_offset + v.at * K::tile_bytes, &p.v[tile.visit->tensor],
                            &bars->v_full[v.at], tile.row(), head, tile.visit->item_v);
      v.next();
    };
    // The first tile of K comes before Q: the block before still reads the memory of Q.
    bool waiting = true;
    auto load_q = [&] {
      if (!waiting) return;
      waiting = false;
      const int item_q = item_of(p.call.source_q, p.shared_q, todo->b);
      wait(&bars->q_empty, q.parity ^ 1);
      copy_rows<K, K::ROWS>(shared, &p.q, &bars->q_full, todo->first, todo->h, item_q);
    };
    for (int g = 0; g < p.call.G; ++g) {
      const Visit *sum_only = todo->visits + todo->begin[g],
                  *with_values = todo->visits + todo->with_values[g],
                  *end = todo->visits + todo->begin[g + 1];
      Tiles tile(sum_only, with_values);
      if (tile.any()) do {
          load_k(tile);
          load_q();
        } while (tile.next());
      Tiles ahead(with_values, end), behind(with_values, end);
      if (!ahead.any()) continue;
      load_k(ahead);
      load_q();
      while (ahead.next()) {
        load_k(ahead);
        load_v(behind);
        behind.next();
      }
      load_v(behind);
    }
    load_q();
    arrive(&bars->work_empty[work.at]);
  }
}

struct alignas(16) Chunk {
  uint32_t words[4];
};

// Where a computing thread is: its warp group, and its thread, warp and lane in that group.
struct ThreadPosition {
  int group, thread, warp, lane;
  FB_INLINE int row() const { return 16 * warp + lane / 4; }  // of the group's 64; its second row is 8 below
};

// Starts s = Q K^T, (64, KEYS).
template <typename K>
FB_DEVICE void start_scores(float (&s)[K::KEYS / 2], uint64_t q, uint64_t k) {
#pragma unroll
  for (int d = 0; d < K::D / 16; ++d)
    multiply<typename K::Type, K::KEYS>(s, advance(q, d / 4 * K::ROWS * 128 + d % 4 * 32),
                                        advance(k, d / 4 * K::KEYS * 128 + d % 4 * 32), d > 0);
  commit_products();
}

// Starts o += P V, (64, D).
template <typename K>
FB_DEVICE void start_output(float (&o)[K::D / 2], const uint32_t (&p)[K::KEYS / 16][4], uint64_t v) {
#pragma unroll
  for (int j = 0; j < K::KEYS / 16; ++j)
    multiply<typename K::Type, K::D>(o, p[j], advance(v, j * 16 * 128), true);
  commit_products();
}

// Sets the values of a tile from `keys` on to zero. They belong to another segment, and 0 * NaN is NaN. Every
// group writes all of these zeros, so that it waits only for itself.
template <typename K>
FB_DEVICE void clear_values(char* tile, int keys, const ThreadPosition& me) {
  const int chunks = (K::KEYS - keys) * 8;
  for (int block = 0; block < K::D / 64; ++block)
    for (int n = me.thread; n < chunks; n += kGroupThreads)
      *(Chunk*)(tile + (block * K::KEYS + keys) * 128 + n * 16) = Chunk{};
  publish_stores();
  sync_some(kGroup + me.group, kGroupThreads);
}

// Ends a segment: adds its sum to l, and keeps it as the segment's mass, relative to the present m.
template <typename K>
FB_DEVICE void close_segment(RowSums& sums, const Visit& visit, float* mass, const ThreadPosition& me) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sum = sums.segment[i] * visit.unfold;
    sums.l[i] += sum;
    sums.segment[i] = 0.f;
    if (mass) {
      const float whole = over_row(sum);
      float* to = mass + visit.segment * 2 * K::ROWS + kGroupRows * me.group + me.row() + 8 * i;
      if (me.lane % 4 == 0) to[0] = whole, to[K::ROWS] = sums.m[i];
    }
  }
}

// The masses of a softmax group's segments: p summed over the rows of a warp. share[i] = 1 / l.
template <typename K>
FB_DEVICE void write_mass(const BlockWork* work, const Visit* begin, const Visit* end, const float* mass,
                          float* by_warp, const float (&m)[2], const float (&share)[2],
                          const ThreadPosition& me) {
  sync_warp();
  for (const Visit* visit = begin; visit < end; visit += 4) {
    const bool mine = visit + me.lane % 4 < end;
    const int c = mine ? visit[me.lane % 4].segment : 0;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = kGroupRows * me.group + me.row() + 8 * i;
      const float* from = mass + c * 2 * K::ROWS + row;
      if (mine && row < work->rows && share[i] != 0.f)
        sum += from[0] * exp2_fast(from[K::ROWS] - m[i]) * share[i];
    }
    sum += shuffle_xor(sum, 4);
    sum += shuffle_xor(sum, 8);
    sum += shuffle_xor(sum, 16);
    if (mine && me.lane < 4) by_warp[c * K::WARPS + kGroupWarps * me.group + me.warp] = sum;
  }
}

// Transposes x over four neighbouring lanes q: x[j] of lane q becomes x[q] of lane j. Each lane then has four
// in a row.
FB_DEVICE void transpose_quad(uint32_t (&x)[4], int q) {
  const bool odd = q & 1, high = q & 2;
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const uint32_t other = uint32_t(shuffle_xor(int(odd ? x[j] : x[j + 1]), 1));
    (odd ? x[j] : x[j + 1]) = other;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t other = uint32_t(shuffle_xor(int(high ? x[j] : x[j + 2]), 2));
    (high ? x[j] : x[j + 2]) = other;
  }
}

// Writes the group's rows of the output from registers; four lanes write 64 bytes of a row. Gathering whole
// rows first would take shared memory from K and V or from the next block's Q.
template <typename K>
FB_DEVICE void store_output(const FbGpuAttention& call, const BlockWork* work, const float (&o)[K::D / 2],
                            const ThreadPosition& me) {
  const int q = me.lane % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = kGroupRows * me.group + me.row() + 8 * i;
    char* out =
        (char*)call.out.data + 2 * (work->b * call.out.stride_b + (work->first + row) * call.out.stride_t +
                                    work->h * call.out.stride_h);
#pragma unroll
    for (int j = 0; j < K::D / 8; j += 4) {
      uint32_t x[4];
#pragma unroll
      for (int n = 0; n < 4; ++n)
        x[n] = pack<typename K::Type>(o[4 * (j + n) + 2 * i], o[4 * (j + n) + 2 * i + 1]);
      transpose_quad(x, q);
      if (row < work->rows && 8 * (j + q) < call.D)
        *(Chunk*)(out + 16 * (j + q)) = Chunk{x[0], x[1], x[2], x[3]};
    }
  }
}

// Computes the rows of one warp group, block after block.
template <typename K>
FB_DEVICE void compute(const Parameters& p, char* shared, const BlockWork* works, Barriers* bars,
                       const ThreadPosition& me) {
  constexpr int KEYS = K::KEYS, D = K::D;
  const FbGpuAttention& call = p.call;
  float* mass = call.partial_mass ? (float*)(shared + K::mass_offset) : nullptr;
  float* mass_by_warp = mass ? mass + call.C * 2 * K::ROWS : nullptr;
  Ring<kWorkBuffers> work;
  Ring<kStages> k, v;
  Ring<1> q;
  const uint64_t q_operand = operand(shared + me.group * kGroupRows * 128, 0, 1024);
  const uint64_t k_operand = operand(shared + K::k_offset, 0, 1024);
  const uint64_t v_operand = operand(shared + K::v_offset, KEYS * 128, 1024);
  auto release = [&](Barrier* b) {
    if (me.lane == 0) arrive(b);
  };
  auto my_turn = [&] { sync_some(kTurn + me.group, 2 * kGroupThreads); };
  const int next_turn = kTurn + (me.group + 1) % K::GROUPS;
  auto your_turn = [&] { arrive_some(next_turn, 2 * kGroupThreads); };
  if (me.group == K::GROUPS - 1) your_turn();

  for (int n = block_index(); n < p.count; n += block_count(), work.next(), q.next()) {
    wait(&bars->work_full[work.at], work.parity);
    const BlockWork* todo = works + work.at;
    const float scale = todo->scale;
    wait(&bars->q_full, q.parity);
    float total[K::GROUPED ? D / 2 : 1];
    if (K::GROUPED)
#pragma unroll
      for (int i = 0; i < D / 2; ++i) total[K::GROUPED ? i : 0] = 0.f;
    float o[D / 2];

    for (int g = 0; g < (K::GROUPED ? call.G : 1); ++g) {
      const Visit *sum_only = todo->visits + todo->begin[g],
                  *with_values = todo->visits + todo->with_values[g],
                  *end = todo->visits + todo->begin[g + 1];
      RowSums sums;
      sums.clear();
      float s[KEYS / 2], decay[2];
      uint32_t prob[KEYS / 16][4];
#pragma unroll
      for (int i = 0; i < D / 2; ++i) o[i] = 0.f;

      Cursor<KEYS> tile(sum_only, with_values);
      while (tile.any()) {
        wait(&bars->k_full[k.at], k.parity);
        begin_products();
        start_scores<K>(s, q_operand, advance(k_operand, k.at * K::tile_bytes));
        await_products<0>();
        pin(s);
        release(&bars->k_empty[k.at]);
        k.next();
        softmax_tile<KEYS, K::POLYNOMIAL>(s, sums, decay, scale, TileTerms(tile), me.lane);
        const Visit& visit = *tile.visit;
        tile.next();
        if (tile.opens()) close_segment<K>(sums, visit, mass, me);
      }

      const bool last = g == call.G - 1;
      tile = Cursor<KEYS>(with_values, end);
      if (!tile.any()) {
        if (last) release(&bars->q_empty);
      } else {
        const TileTerms first(tile);
        wait(&bars->k_full[k.at], k.parity);
        my_turn();
        begin_products();
        start_scores<K>(s, q_operand, advance(k_operand, k.at * K::tile_bytes));
        your_turn();
        await_products<0>();
        pin(s);
        release(&bars->k_empty[k.at]);
        k.next();
        softmax_tile<KEYS, K::POLYNOMIAL>(s, sums, decay, scale, first, me.lane);
        pack_probabilities<typename K::Type, KEYS>(s, sums.shift_factor(first.shift), prob);
        for (;;) {
          const Visit& before = *tile.visit;
          const int keys = tile.keys();
          if (!tile.next()) {
            if (last) release(&bars->q_empty);
            close_segment<K>(sums, before, mass, me);
            wait(&bars->v_full[v.at], v.parity);
            if (keys < KEYS) clear_values<K>(shared + K::v_offset + v.at * K::tile_bytes, keys, me);
            break;
          }
          if (tile.opens()) close_segment<K>(sums, before, mass, me);
          const TileTerms next(tile);
          wait(&bars->k_full[k.at], k.parity);
          wait(&bars->v_full[v.at], v.parity);
          if (keys < KEYS) clear_values<K>(shared + K::v_offset + v.at * K::tile_bytes, keys, me);
          my_turn();
          begin_products();
          start_scores<K>(s, q_operand, advance(k_operand, k.at * K::tile_bytes));
          begin_products();
          start_output<K>(o, prob, advance(v_operand, v.at * K::tile_bytes));
          your_turn();
          await_products<1>();
          pin(s);
          release(&bars->k_empty[k.at]);
          k.next();
          const bool raised = softmax_tile<KEYS, K::POLYNOMIAL>(s, sums, decay, scale, next, me.lane);
          if (FLASHBRUSH_OVERLAP) finish(sums.segment[0] + sums.segment[1]);
          await_products<0>();
          pin(o);
          release(&bars->v_empty[v.at]);
          v.next();
          if (raised)
#pragma unroll
            for (int i = 0; i < D / 2; ++i) o[i] *= decay[i / 2 % 2];
          pack_probabilities<typename K::Type, KEYS>(s, sums.shift_factor(next.shift), prob);
        }
        begin_products();
        start_output<K>(o, prob, advance(v_operand, v.at * K::tile_bytes));
        await_products<0>();
        pin(o);
        release(&bars->v_empty[v.at]);
        v.next();
      }

      float share[2], factor[2];
      const float gain = call.gain.data ? row_of(call.gain, todo->b, todo->h)[todo->r] : 1.f;
      const float* contrast = call.contrast && call.contrast[4 * g] != 0.f ? call.contrast + 4 * g : nullptr;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float l = over_row(sums.l[i]);
        share[i] = l == 0.f ? 0.f : 1.f / l;
        const int row = kGroupRows * me.group + me.row() + 8 * i;
        const bool exists = row < todo->rows;
        if (call.lse && exists && me.lane % 4 == 0)
          call.lse[((int64_t(todo->b) * call.H + todo->h) * call.M + todo->first + row) * call.G + g] =
              (sums.m[i] + log2_fast(l)) * kLn2;
        float gate = gain;
        if (call.gates.data && exists)
          gate *=
              call.gates.data[todo->b * call.gates.stride_b + (todo->first + row) * call.gates.stride_h + g];
        factor[i] = gate;
      }
      if (mass) write_mass<K>(todo, sum_only, end, mass, mass_by_warp, sums.m, share, me);
      const float unshift = sums.shift == -kInf ? 1.f : exp2f(sums.shift);
#pragma unroll
      for (int i = 0; i < D / 2; ++i) o[i] *= share[i / 2 % 2] * unshift;
      if (contrast) {
        const float beta = contrast[1],
                    rest = (1.f - beta) / float(todo->allowed[g] > 0 ? todo->allowed[g] : 1);
        const float* value_sums =
            call.value_sums +
            (int64_t(todo->b) * call.Hkv + todo->h / (call.H / call.Hkv)) * call.C * call.D +
            2 * (me.lane % 4);
#pragma unroll
        for (int i = 0; i < D / 2; ++i) o[i] *= beta;
        for (const Visit* visit = with_values; visit < end; ++visit)
#pragma unroll
          for (int i = 0; i < D / 2; ++i)
            if (8 * (i / 4) < call.D)
              o[i] += rest * visit->weight * value_sums[visit->segment * call.D + 8 * (i / 4) + i % 2];
      }
#pragma unroll
      for (int i = 0; i < D / 2; ++i) {
        o[i] *= factor[i / 2 % 2];
        if (K::GROUPED) o[i] = total[K::GROUPED ? i : 0] += o[i];
      }
    }

    store_output<K>(call, todo, o, me);
    if (mass) {
      sync_some(kGroup + me.group, kGroupThreads);
      float* to =
          call.partial_mass +
          ((int64_t(n / call.row_blocks) * call.row_blocks + block_of(call, n)) * K::GROUPS + me.group) *
              call.C;
      for (int c = me.thread; c < call.C; c += kGroupThreads) {
        bool visited = false;
        for (int i = 0; i < todo->begin[call.G]; ++i) visited |= todo->visits[i].segment == c;
        const float* from = mass_by_warp + c * K::WARPS + kGroupWarps * me.group;
        to[c] = visited ? (from[0] + from[1]) + (from[2] + from[3]) : 0.f;
      }
      sync_some(kGroup + me.group, kGroupThreads);  // before the next block's sums
    }
    sync_warp();  // other lanes may still read this BlockWork
    release(&bars->work_empty[work.at]);
  }
}

// The kernel: warp 0 loads, warp 1 describes the blocks' work, warps 4 and up compute.
template <typename K>
__global__ void __launch_bounds__(K::THREADS, 1) attention_forward(const __grid_constant__ Parameters p) {
  char* shared = shared_memory();
  BlockWork* works = (BlockWork*)(shared + K::works_offset);
  Barriers* bars = (Barriers*)(shared + K::barriers_offset);
  const int warp = uniform(thread_index() / 32), lane = thread_index() % 32;
  if (thread_index() == 0) {
    init_barrier(&bars->q_full, 1);
    init_barrier(&bars->q_empty, K::WARPS);
    for (int i = 0; i < kWorkBuffers; ++i)
      init_barrier(&bars->work_full[i], 32), init_barrier(&bars->work_empty[i], K::WARPS + 1);
    for (int i = 0; i < kStages; ++i) {
      init_barrier(&bars->k_full[i], 1), init_barrier(&bars->k_empty[i], K::WARPS);
      init_barrier(&bars->v_full[i], 1), init_barrier(&bars->v_empty[i], K::WARPS);
    }
    publish_barriers();
    prefetch_map(&p.q), prefetch_map(&p.k[0]), prefetch_map(&p.v[0]);
  }
  sync_block();
  if (warp < 4) {
    give_registers<K::LOAD_REGISTERS>();
    if (warp == 0 && lane == 0) load_tiles<K>(p, shared, works, bars);
    if (warp == 1) describe_blocks<K>(p, works, bars, lane);
  } else {
    take_registers<K::REGISTERS>();
    compute<K>(p, shared, works, bars,
               ThreadPosition{(warp - 4) / 4, thread_index() % kGroupThreads, warp % 4, lane});
  }
}

}  // namespace flashbrush
