// A thread's scratch memory, handed out piece by piece; a copy hands out the same bytes again.
#pragma once

#include "kernels.h"

namespace peftdyno {

struct Scratch {
  uint8_t* next;

  // Room for `count` values, 64-byte aligned.
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next);
    next += padded_to(count * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
};

}  // namespace peftdyno
