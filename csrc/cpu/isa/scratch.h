// Cuts one allocation into arrays: the same code computes the size that is needed and sets the pointers.
#pragma once
#include "kernels.h"

namespace {

// Every array starts at a multiple of 64 bytes, a cache line and the widest vector.
struct Arena {
  char* base;  // null: only sizes are computed
  size_t bytes = 0;

  // Point to the next `count` elements of 4 bytes.
  template <typename T>
  void take(T*& pointer, int64_t count) {
    static_assert(sizeof(T) == 4);
    pointer = (T*)(base + bytes);
    bytes += size_t(flashbrush::round_up(count * 4, 64));
  }
};

}  // namespace
