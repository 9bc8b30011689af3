// Tensor memory access: boxes of up to five dimensions between global and shared memory. What lies
// outside the tensor reads as zero and is not written. Coordinates are elements, innermost first.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace wh::cuda::ptx {

// How long L2 should keep what a copy reads. The values are the encodings that createpolicy makes
// of a fraction of 1.
enum class CacheHint : uint64_t {
  kEvictNormal = 0x1000000000000000,
  kEvictFirst = 0x12F0000000000000,
  kEvictLast = 0x14F0000000000000,
};

__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void tma_load_4d(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                            int c0, int c1, int c2, int c3,
                                            CacheHint hint = CacheHint::kEvictNormal) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(static_cast<uint64_t>(hint))
      : "memory");
}

__device__ __forceinline__ void tma_load_5d(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                            int c0, int c1, int c2, int c3, int c4,
                                            CacheHint hint = CacheHint::kEvictNormal) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4),
      "l"(static_cast<uint64_t>(hint))
      : "memory");
}

// To the same place in every block of the cluster whose bit is set; each block's barrier counts.
__device__ __forceinline__ void tma_multicast_4d(uint32_t to, const CUtensorMap* map,
                                                 uint32_t barrier, int c0, int c1, int c2, int c3,
                                                 uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(blocks)
      : "memory");
}

__device__ __forceinline__ void tma_multicast_5d(uint32_t to, const CUtensorMap* map,
                                                 uint32_t barrier, int c0, int c1, int c2, int c3,
                                                 int c4, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "h"(blocks)
      : "memory");
}

// Copies consecutive bytes from shared to global memory, both aligned to 16, and so many of them.
// The calling thread's copies form groups: commit closes one, wait returns once all are written.
__device__ __forceinline__ void bulk_store(void* to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace wh::cuda::ptx
