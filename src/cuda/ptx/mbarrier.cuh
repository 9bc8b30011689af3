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

// A word that another block of the cluster stores, by store_at(). By a volatile pointer
// sm90_prefill_wide had its rings in vector registers, 16 moves to uniform ones a tile of keys.
__device__ __forceinline__ int32_t load_word(uint32_t address) {
  int32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

// Stores a word in block `rank` of the cluster. The address stays 32 bits wide: by
// __cluster_map_shared_rank() sm90_prefill_wide's producer, of 40 registers, spilled.
__device__ __forceinline__ void store_at(uint32_t address, uint32_t rank, int32_t value) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "st.shared::cluster.b32 [there], %2;\n}" ::"r"(address),
      "r"(rank), "r"(value)
      : "memory");
}

// Arrives there with all that this thread has stored, in other blocks too, for those who wait by
// mbarrier_acquire(). st.async is no substitute: see Mailbox of sm90_prefill_wide.
__device__ __forceinline__ void mbarrier_release_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Arrives and expects `bytes` of asynchronous copies.
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// How long a warp sleeps before it asks again: without a time it asks again and again, which was a
// sixth of all instructions of sm90_prefill, cleaners' and producer's.
constexpr uint32_t kLongestSleepNs = 10'000'000;

// Returns once the phase with this parity is complete.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n}" ::"r"(barrier),
      "r"(parity), "r"(kLongestSleepNs)
      : "memory");
}

// mbarrier_wait() for what other blocks of the cluster have stored.
__device__ __forceinline__ void mbarrier_acquire(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1, %2;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n}" ::"r"(barrier),
      "r"(parity), "r"(kLongestSleepNs)
      : "memory");
}

}  // namespace wh::cuda::ptx
