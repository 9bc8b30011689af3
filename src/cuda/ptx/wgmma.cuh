// Warpgroup-wide asynchronous products from sm_90a on: d += a b, d 64 x N in f32, k 16 a step.
//
// Shared-memory operands are stored as TMA's 128-byte swizzle leaves them: panels of 64 16-bit
// columns, [rows][64], 1024-byte aligned. The same image of a [keys][dim] tile is K (k-major: rows
// are N) and V (transposed: rows are k).
#pragma once

#include <cstdint>

#include "cuda/ptx/wgmma_shapes.cuh"

namespace wh::cuda::ptx {

enum class OperandB : int { kRowsAreN = 0, kRowsAreK = 1 };

// Orders the registers that wgmma reads and writes before the products issued next.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Returns once at most kPending groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Pins registers between issue and wait: without it the compiler moves accumulators around and then
// serialises every product of the function (C7510, C7513).
template <int kCount>
__device__ __forceinline__ void keep(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void keep(uint32_t (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(values[i])::"memory");
}

// Descriptor of a swizzled panel. Groups of 8 rows are 1024 bytes apart; `panel_stride_bytes` is
// the way to the next 64 columns and matters only where rows are k and N exceeds 64. Opaque, so
// that the compiler adds constants to it and does not keep one register pair for every step.
__device__ __forceinline__ uint64_t panel_descriptor(uint32_t address,
                                                     uint32_t panel_stride_bytes = 16) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kRowGroups = uint64_t{1024 >> 4} << 32;
  uint64_t descriptor = kSwizzle128 | kRowGroups |
                        (static_cast<uint64_t>(panel_stride_bytes >> 4) << 16) |
                        ((address & 0x3FFFF) >> 4);
  asm volatile("" : "+l"(descriptor));
  return descriptor;
}

// What to add to a descriptor to move on by so many bytes.
constexpr uint64_t descriptor_offset(uint32_t bytes) { return bytes >> 4; }

}  // namespace wh::cuda::ptx
