// A ring of slots in shared memory, as its producer and its consumers count through it.
#pragma once

#include <cstdint>

namespace wh::cuda {

// Which of the slots [kFirst, kFirst + kCount) is next, and the parity of its barriers' phase.
template <int kCount, int kFirst = 0>
struct Ring {
  int slot = kFirst;
  uint32_t parity = 0;

  static __device__ __forceinline__ int after(int slot) {
    return slot + 1 == kFirst + kCount ? kFirst : slot + 1;
  }
  __device__ __forceinline__ void next() {
    slot = after(slot);
    if (slot == kFirst) parity ^= 1;
  }
};

}  // namespace wh::cuda
