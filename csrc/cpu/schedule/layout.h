// How the keys of an item are cut into tiles, and its rows into blocks.
#pragma once
#include <algorithm>

#include "schedule/dispatch.h"

namespace flashbrush {

constexpr int kShort = 32;  // segments of fewer keys share a tile with their neighbours

struct ItemLayout {
  std::vector<Tile> tiles;
  std::vector<Piece> pieces;
  std::vector<int32_t> group_tiles;
  Layout view() const { return {tiles.data(), pieces.data(), group_tiles.data(), int32_t(tiles.size())}; }
};

// Whether every row of every head reads segment c: no bias is -inf, no weight is 0. Keys of other segments
// must not be read by some rows, so those segments have tiles of their own.
inline bool always_read(const FbAttention* p, int64_t c) {
  for (const FbTable* t : {&p->bias, &p->weight}) {
    if (!t->data) continue;
    for (int64_t b = 0; b < (t->stride_b ? p->B : 1); ++b)
      for (int64_t h = 0; h < (t->stride_h ? p->H : 1); ++h)
        for (int64_t r = 0; r < p->R; ++r) {
          const float x = t->data[b * t->stride_b + h * t->stride_h + r * p->C + c];
          if (t == &p->bias ? x == -__builtin_inff() : x == 0.f) return false;
        }
  }
  return true;
}

// The tiles of item b. shareable[c]: whether a short segment c may share a tile.
inline ItemLayout lay_out(const FbAttention* p, int64_t b, int tile_keys,
                          const std::vector<char>& shareable) {
  ItemLayout out;
  const int32_t* lengths = p->key_lengths + (p->keys_by_item ? b * p->C : 0);
  std::vector<int64_t> starts(p->C, 0);
  for (int64_t c = 1; c < p->C && p->L == 1; ++c) starts[c] = starts[c - 1] + lengths[c - 1];
  for (int64_t g = 0; g < p->G; ++g) {
    out.group_tiles.push_back(int32_t(out.tiles.size()));
    bool open = false;  // the last tile takes more short segments
    for (int64_t c = 0; c < p->C; ++c) {
      if (p->groups[c] != g) continue;
      int64_t length = lengths[c];
      if (p->valid) length = std::max<int64_t>(0, std::min<int64_t>(length, p->valid[b * p->C + c]));
      const int32_t tensor = p->L == 1 ? 0 : int32_t(c);
      const bool is_short = length > 0 && length < kShort && shareable[c];
      if (is_short && open && out.tiles.back().count + length <= tile_keys) {
        Tile& tile = out.tiles.back();
        out.pieces.push_back({int32_t(c), tensor, tile.count, int32_t(length), starts[c]});
        tile.count += int32_t(length), ++tile.pieces;
        continue;
      }
      for (int64_t first = 0; first < length; first += tile_keys) {
        const int32_t count = int32_t(std::min<int64_t>(tile_keys, length - first));
        out.tiles.push_back({int32_t(out.pieces.size()), 1, count});
        out.pieces.push_back({int32_t(c), tensor, 0, count, starts[c] + first});
      }
      if (length) open = is_short;
    }
  }
  out.group_tiles.push_back(int32_t(out.tiles.size()));
  return out;
}

// The rows of item b in blocks of at most `limit` rows of one segment: a segment's blocks are of equal size,
// rounded up to a multiple of `group`.
inline std::vector<RowTask> cut_rows(const FbAttention* p, int64_t b, int64_t limit, int group) {
  std::vector<RowTask> out;
  const int32_t* lengths = p->row_lengths + (p->rows_by_item ? b * p->R : 0);
  int64_t start = 0;
  for (int64_t r = 0; r < p->R; ++r) {
    const int64_t length = lengths[r], parts = (length + limit - 1) / limit;
    const int64_t size = parts ? round_up((length + parts - 1) / parts, group) : 0;
    for (int64_t first = 0; first < length; first += size)
      out.push_back({0, 0, int32_t(r), 0, start + first, std::min(size, length - first)});
    start += length;
  }
  return out;
}

}  // namespace flashbrush
