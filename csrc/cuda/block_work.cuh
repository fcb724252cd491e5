// What a block of rows has to visit: the key segments that it sees, with their constants, made in shared
// memory by a warp of its own while the block before is computed, so that no product ever waits for a table.
#pragma once
#include "attention.h"
#ifdef FLASHBRUSH_EMULATED
#include "hopper_emulated.h"
#else
#include "host.cuh"
#endif

namespace flashbrush {

constexpr int kGroupRows = 64;  // of a block, for each warp group that computes
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInf = __builtin_huge_valf();

// Largest |log2(weight)| inside the exponent. Two such weights move the largest logit 60 away from the
// maximum, which leaves the sum of the unweighted probabilities 66 binary digits above float32's underflow.
constexpr float kMostFold = 30.f;

// Passed by value: a tensor map has to lie in parameter or global memory.
struct Parameters {
  TensorMap q;
  TensorMap k[FB_MOST_SEGMENTS], v[FB_MOST_SEGMENTS];
  FbGpuAttention call;          // its lists of tensors are not the GPU's
  int32_t count;                // of row blocks of all items and heads
  uint32_t shared_k, shared_v;  // bit n: tensor n has one item
  int32_t shared_q;
};

// A key segment that the rows see. A tile's exponent is s * scale + add - m, its P then 2^-shift too small
// for the output and 1 / unfold too large for the sum.
struct Visit {
  int segment, tensor, start, count;
  int item_k, item_v;
  float add, shift, unfold, weight;
};

struct alignas(16) Plan {
  int b, h, r, first, rows;       // rows first .. first + rows - 1 of segment r
  float scale;                    // of logits in log2 units
  int begin[FB_MOST_GROUPS + 1];  // of each group's visits
  int loud[FB_MOST_GROUPS];     // the first that is not silent: those of weight 0 count in the sum alone, and
                                // come first
  int allowed[FB_MOST_GROUPS];  // keys
  Visit visits[FB_MOST_SEGMENTS];
};

FB_DEVICE int least(int a, int b) {
  return a < b ? a : b;
}

FB_DEVICE const float* row_of(const FbGpuTable& table, int b, int h) {
  return table.data ? table.data + b * table.stride_b + h * table.stride_h : nullptr;
}

// The item that output item b reads; a tensor that all share may be a broadcast, whose map has one item
// whatever is asked.
FB_DEVICE int item_of(const int64_t* source, bool shared, int b) {
  return shared ? 0 : source ? int(source[b]) : b;
}

// weight = 2^(fold + shift), with shift 0 but for weights outside 2^-30 .. 2^30.
FB_DEVICE void fold_weight(float weight, float& fold, float& shift) {
  const float power = maximum(log2_fast(weight), -126.f);
  shift = power > kMostFold ? ceilf(power - kMostFold) : power < -kMostFold ? floorf(power + kMostFold) : 0.f;
  fold = power - shift;
}

FB_DEVICE int block_of(const FbGpuAttention& call, int index) {
  return call.order ? call.order[index % call.row_blocks] : index % call.row_blocks;
}

// By the 32 lanes of a warp, one key segment each.
FB_DEVICE void make_plan(const Parameters& p, int index, int block_rows, int lane, Plan* plan) {
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
    const uint32_t silent = votes_of_warp(group == g && visit.weight == 0.f),
                   loud = votes_of_warp(group == g && visit.weight != 0.f);
    const uint32_t before = (1u << lane) - 1u;
    if (group == g)
      plan->visits[visit.weight == 0.f ? place + count_bits(silent & before)
                                       : place + count_bits(silent) + count_bits(loud & before)] = visit;
    int allowed = group == g ? visit.count : 0;
    for (int mask = 16; mask > 0; mask >>= 1) allowed += shuffle_xor(allowed, mask);
    if (lane == 0) {
      plan->begin[g] = place;
      plan->loud[g] = place + count_bits(silent);
      plan->allowed[g] = allowed;
    }
    place += count_bits(silent | loud);
  }
  if (lane == 0) {
    plan->begin[call.G] = place;
    // A block beyond the item's last row has no rows, and no segment either.
    plan->b = b, plan->h = h, plan->r = rows > 0 ? r : 0, plan->first = first, plan->rows = rows;
    const float* scale = row_of(call.scales, b, h);
    plan->scale = (scale ? *scale : call.scale) * kLog2e;
    if (plan->scale == 0.f) plan->scale = 1.17549435e-38f;  // to which a masked logit of -inf is still -inf
  }
}

// Walks the tiles of KEYS keys of some visits; the last tile of a visit may be short.
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
