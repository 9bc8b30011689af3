// The two products of attention for the 64 rows of a warpgroup, on wgmma, of operands in panels.
// Both only issue: who calls keeps the sums in their registers until it has waited.
#pragma once

#include <cstdint>

#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/common/panels.h"

namespace wh::cuda {

// S (+)= Q K^T over kSteps steps of 16 columns. Q's panels have kQueryRows rows, K's kKeys.
template <typename T, int kKeys, int kQueryRows, int kSteps>
__device__ __forceinline__ void issue_scores(float (&s)[kKeys / 2], uint64_t q, uint64_t k,
                                             bool adds = false) {
  constexpr int kKeysAreColumns = static_cast<int>(ptx::OperandB::kRowsAreN);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int panel = step / kPanelSteps, within = step % kPanelSteps * kStepColumns * 2;
    ptx::Wgmma<kKeys, T>::template ss<kKeysAreColumns>(
        s, q + ptx::descriptor_offset(panel * panel_bytes(kQueryRows) + within),
        k + ptx::descriptor_offset(panel * panel_bytes(kKeys) + within), adds || step != 0);
  }
  ptx::wgmma_commit();
}

// O += P V over kSteps steps of 16 keys, P in registers.
template <typename T, int kColumns, int kSteps>
__device__ __forceinline__ void issue_values(float (&o)[kColumns / 2], const uint32_t* p,
                                             uint64_t v) {
  constexpr int kKeysAreSummed = static_cast<int>(ptx::OperandB::kRowsAreK);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    ptx::Wgmma<kColumns, T>::template rs<kKeysAreSummed>(
        o, p + 4 * step, v + ptx::descriptor_offset(panel_bytes(step * kStepColumns)), 1);
  }
  ptx::wgmma_commit();
}
// The same with P in panels of 64 rows in shared memory; `first_step` is of the tile's keys.
template <typename T, int kColumns, int kSteps>
__device__ __forceinline__ void issue_values(float (&o)[kColumns / 2], uint64_t p, int first_step,
                                             uint64_t v) {
  constexpr int kKeysAreSummed = static_cast<int>(ptx::OperandB::kRowsAreK);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int step = first_step + i;
    ptx::Wgmma<kColumns, T>::template ss<kKeysAreSummed>(
        o,
        p + ptx::descriptor_offset(step / kPanelSteps * panel_bytes(64) +
                                   step % kPanelSteps * kStepColumns * 2),
        v + ptx::descriptor_offset(panel_bytes(i * kStepColumns)), 1);
  }
  ptx::wgmma_commit();
}

}  // namespace wh::cuda
