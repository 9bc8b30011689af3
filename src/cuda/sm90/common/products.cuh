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

// kCount of the sums, which a product adds to.
template <int kCount, int kAll>
__device__ __forceinline__ float (&sums_from(float (&o)[kAll], int first))[kCount] {
  return reinterpret_cast<float(&)[kCount]>(o[first]);
}
// Where the step's keys are in the columns from `first` on of a tile of V with kRows keys.
template <int kRows>
constexpr uint64_t value_offset(int step, int first) {
  return ptx::descriptor_offset(panel_bytes(first / kPanelColumns * kRows + step * kStepColumns));
}

// O += P V over kSteps steps of 16 keys, all of V's tile, P in registers. kProduct: columns of a
// product.
template <typename T, int kColumns, int kSteps, int kProduct = kColumns>
__device__ __forceinline__ void issue_values(float (&o)[kColumns / 2], const uint32_t* p,
                                             uint64_t v) {
  constexpr int kKeysAreSummed = static_cast<int>(ptx::OperandB::kRowsAreK);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int first = 0; first < kColumns; first += kProduct) {
      ptx::Wgmma<kProduct, T>::template rs<kKeysAreSummed>(
          sums_from<kProduct / 2>(o, first / 2), p + 4 * step,
          v + value_offset<kSteps * kStepColumns>(step, first), 1);
    }
  }
  ptx::wgmma_commit();
}
// The same with P in panels of 64 rows in shared memory; `first_step` is of the tile's keys.
template <typename T, int kColumns, int kSteps, int kProduct = kColumns>
__device__ __forceinline__ void issue_values(float (&o)[kColumns / 2], uint64_t p, int first_step,
                                             uint64_t v) {
  constexpr int kKeysAreSummed = static_cast<int>(ptx::OperandB::kRowsAreK);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int step = first_step + i;
#pragma unroll
    for (int first = 0; first < kColumns; first += kProduct) {
      ptx::Wgmma<kProduct, T>::template ss<kKeysAreSummed>(
          sums_from<kProduct / 2>(o, first / 2),
          p + ptx::descriptor_offset(step / kPanelSteps * panel_bytes(64) +
                                     step % kPanelSteps * kStepColumns * 2),
          v + value_offset<kSteps * kStepColumns>(i, first), 1);
    }
  }
  ptx::wgmma_commit();
}

}  // namespace wh::cuda
