// The work of a block of rows: which key segments it visits, with their constants. A warp writes it to shared
// memory while the block before is computed, so that no product waits for a table.
#pragma once
#include "attention.h"
#ifdef FLASHBRUSH_EMULATED
#include "hopper_emulated.h"
#else
#include "host.cuh"
#endif

namespace flashbrush {

constexpr int kGroupRows = 64;  // rows of a warp group that computes
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInf = __builtin_huge_valf();

// Largest |log2(weight)| that is added to the exponent. Two weights of opposite sign then move the largest
// logit by 60, and the sum of the unweighted probabilities stays 66 binary digits above float32's underflow.
constexpr float kMostFold = 30.f;

// Passed by value, because a tensor map has to be in parameter or global memory.
struct Parameters {
  TensorMap q;
  TensorMap k[FB_MOST_SEGMENTS], v[FB_MOST_SEGMENTS];
  FbGpuAttention call;          // k, v: not to be read here, they point to the caller's memory
  int32_t count;                // blocks of rows of all items and heads
  uint32_t shared_k, shared_v;  // bit n: tensor n has one item
  int32_t shared_q;
};

// A key segment that the rows visit. With P = 2^(s * scale + add - m), the output is the sum of P * 2^shift *
// v and the sum of probabilities is that of P * unfold.
struct Visit {
  int segment, tensor;
  int start, count;    // keys, in the tensor's tokens
  int item_k, item_v;  // items of the tensors
  float add, shift, unfold, weight;
};

struct alignas(16) BlockWork {
  int b, h, r, first, rows;       // rows first .. first + rows - 1 of segment r
  float scale;                    // of logits in log2 units
  int begin[FB_MOST_GROUPS + 1];  // where the visits of a softmax group begin
  // Where those begin whose values are read. Visits of weight 0 come first: they add to the sum of
  // probabilities only.
  int with_values[FB_MOST_GROUPS];
  int allowed[FB_MOST_GROUPS];  // keys of a softmax group that are not removed
  Visit visits[FB_MOST_SEGMENTS];
};

FB_DEVICE int least(int a, int b) {
  return a < b ? a : b;
}

FB_DEVICE const float* row_of(const FbGpuTable& table, int b, int h) {
  return table.data ? table.data + b * table.stride_b + h * table.stride_h : nullptr;
}

// The item that output item b reads; 0 in a tensor that has one item for all.
FB_DEVICE int item_of(const int64_t* source, bool shared, int b) {
  return shared ? 0 : source ? int(source[b]) : b;
}

// weight = 2^(fold + shift). shift is 0 for weights in 2^-30 .. 2^30.
FB_DEVICE void fold_weight(float weight, float& fold, float& shift) {
  const float power = maximum(log2_fast(weight), -126.f);
  shift = power > kMostFold ? ceilf(power - kMostFold) : power < -kMostFold ? floorf(power + kMostFold) : 0.f;
  fold = power - shift;
}

// The block of rows that comes index-th, of its item and head.
FB_DEVICE int block_of(const FbGpuAttention& call, int index) {
  return call.order ? call.order[index % call.row_blocks] : index % call.row_blocks;
}

// Run by the 32 lanes of a warp; each lane describes one key segment.
FB_DEVICE void describe_block(const Parameters& p, int index, int block_rows, int lane, BlockWork* work) {
  const FbGpuAttention& call = p.call;
  const int head = index / call.row_blocks, b = head / call.H, h = head % call.H;
  int block = block_of(call, index);

  const int32_t* starts = call.row_starts + (call.rows_by_item ? b * (call.R + 1) : 0);
  int r = 0, first = 0, rows = 0;
  for (; r < call.R; ++r) {
    const int begin = starts[r], length = starts[r + 1] - begin,
              blocks = (length + block_rows - 1) / block_rows;
    if (block < blocks) {
      first = begin + block * block_rows;
      rows = least(block_rows, begin + length - first);
      break;
    }
    block -= blocks;
  }

  Visit visit{};
  int group = -1;
  if (lane < call.C && rows > 0) {
    const int c = lane;
    const int32_t* key_starts = call.key_starts + (call.keys_by_item ? b * (call.C + 1) : 0);
    visit.segment = c;
    visit.tensor = call.L > 1 ? c : 0;
    visit.start = call.L > 1 ? 0 : key_starts[c];
    visit.count = key_starts[c + 1] - key_starts[c];
    if (call.valid) visit.count = least(visit.count, call.valid[b * call.C + c]);
    visit.item_k = item_of(call.source_k ? call.source_k + visit.tensor * call.B : nullptr,
                           p.shared_k >> visit.tensor & 1, b);
    visit.item_v = item_of(call.source_v ? call.source_v + visit.tensor * call.B : nullptr,
                           p.shared_v >> visit.tensor & 1, b);
    const float* bias = row_of(call.bias, b, h);
    const float* weights = row_of(call.weight, b, h);
    const float offset = bias ? bias[r * call.C + c] * kLog2e : 0.f;
    visit.weight = weights ? weights[r * call.C + c] : 1.f;
    float fold = 0.f;
    if (visit.weight > 0.f && visit.weight != 1.f) fold_weight(visit.weight, fold, visit.shift);
    visit.add = offset + fold;
    visit.unfold = exp2f(-fold);
    if (visit.count > 0 && offset != -kInf) group = call.groups[c];
  }
  int place = 0;
  for (int g = 0; g < call.G; ++g) {
    const uint32_t sum_only = votes_of_warp(group == g && visit.weight == 0.f),
                   with_values = votes_of_warp(group == g && visit.weight != 0.f);
    const uint32_t before = (1u << lane) - 1u;
    if (group == g)
      work->visits[visit.weight == 0.f ? place + count_bits(sum_only & before)
                                       : place + count_bits(sum_only) + count_bits(with_values & before)] =
          visit;
    int allowed = group == g ? visit.count : 0;
    for (int mask = 16; mask > 0; mask >>= 1) allowed += shuffle_xor(allowed, mask);
    if (lane == 0) {
      work->begin[g] = place;
      work->with_values[g] = place + count_bits(sum_only);
      work->allowed[g] = allowed;
    }
    place += count_bits(sum_only | with_values);
  }
  if (lane == 0) {
    work->begin[call.G] = place;
    // A block beyond the item's last row has no rows and visits nothing.
    work->b = b, work->h = h, work->r = rows > 0 ? r : 0, work->first = first, work->rows = rows;
    const float* scale = row_of(call.scales, b, h);
    work->scale = (scale ? *scale : call.scale) * kLog2e;
    if (work->scale == 0.f) work->scale = 1.17549435e-38f;  // a masked logit of -inf stays -inf
  }
}

// Steps through the tiles of visits begin .. end: KEYS keys each, the last tile of a visit may have fewer.
template <int KEYS>
struct Cursor {
  const Visit *visit, *end;
  int done;

  FB_INLINE Cursor(const Visit* begin, const Visit* end) : visit(begin), end(end), done(0) {}
  FB_INLINE bool any() const { return visit < end; }
  FB_INLINE bool opens() const { return done == 0; }
  FB_INLINE int keys() const { return least(KEYS, visit->count - done); }
  FB_INLINE int row() const { return visit->start + done; }
  FB_INLINE bool next() {
    done += KEYS;
    if (done < visit->count) return true;
    done = 0;
    return ++visit < end;
  }
};

}  // namespace flashbrush
