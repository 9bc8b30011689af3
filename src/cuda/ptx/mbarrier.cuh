// Transaction barriers in shared memory (mbarrier). Addresses are 32-bit shared-window addresses.
#pragma once

#include <cstdint>

namespace wh::cuda::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to TMA and to the other blocks of a cluster.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the same barrier of block `rank` of the cluster. Without .release.cluster, which costs
// a MEMBAR.ALL.GPU an arrival (185 instead of 566 TFLOP/s at dim 512): enough where the slot was
// only read, by wgmma that was already waited for.
__device__ __forceinline__ void mbarrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Arrives and expects `bytes` of asynchronous copies.
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Returns once the phase with this parity is complete. The warp sleeps until then: without a time
// it asks again and again, which was a sixth of all instructions of sm90_prefill, cleaners' and
// producer's.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  constexpr uint32_t kLongestSleepNs = 10'000'000;
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n}" ::"r"(barrier),
      "r"(parity), "r"(kLongestSleepNs)
      : "memory");
}

// Stores 8 bytes in block `rank` of the cluster and counts them on that block's barrier.
__device__ __forceinline__ void store_remote(uint32_t address, uint32_t barrier, uint32_t rank,
                                             uint64_t value) {
  asm volatile(
      "{\n.reg .b32 there, bar;\n"
      "mapa.shared::cluster.u32 there, %0, %2;\n"
      "mapa.shared::cluster.u32 bar, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [there], %3, [bar];\n}" ::"r"(
          address),
      "r"(barrier), "r"(rank), "l"(value)
      : "memory");
}

}  // namespace wh::cuda::ptx
