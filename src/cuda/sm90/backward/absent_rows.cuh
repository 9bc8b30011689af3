// Rows of a tile that a block must not sum, in shared memory: they may hold NaN, which a weight of
// 0 does not silence. Maps that begin in front of a packed tensor, so that TMA would find rows past
// a sequence's end outside of it, fail: no address in front of an allocation may be in one, asked
// for or not.
#pragma once

#include <cstdint>

#include "cuda/common/key_range.h"
#include "cuda/ptx/sync.cuh"

namespace wh::cuda {

// Rows of panels of kRows rows, of which the first is number `first`, that are not in `met` become
// 0. By kThreads consumers together, who multiply thereafter.
template <int kRows, int kThreads>
__device__ __forceinline__ void clear_absent_rows(unsigned char* s_panels, int bytes, int32_t first,
                                                  Keys met, int cleaned) {
  auto* chunks = reinterpret_cast<uint4*>(s_panels);
#pragma unroll 1
  for (int i = (threadIdx.x - 128) % kThreads; i < bytes / 16; i += kThreads) {
    const int32_t row = first + i / 8 % kRows;
    if (row < met.begin || row >= met.end) chunks[i] = make_uint4(0, 0, 0, 0);
  }
  ptx::async_proxy_fence();
  ptx::named_sync(cleaned, kThreads);
}

}  // namespace wh::cuda
