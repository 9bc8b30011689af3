// Cards that are not there, to plan for.
#pragma once

#include "cuda/cuda_facts.h"

namespace wh {

inline CudaFacts card(int32_t compute_capability, int64_t shared_bytes) {
  CudaFacts facts;
  facts.name = "a card";
  facts.compute_capability = compute_capability;
  facts.sms = 100;
  facts.shared_bytes = shared_bytes;
  facts.tensor_tflops = 300;
  facts.read_gbytes_per_s = 1000;
  return facts;
}
inline CudaFacts ampere() { return card(80, 166912); }
inline CudaFacts ada() { return card(89, 101376); }

// As the driver describes it.
inline CudaFacts h100() {
  CudaFacts facts = card(90, 232448);
  facts.name = "NVIDIA H100 80GB HBM3";
  facts.sms = 132;
  facts.l2_bytes = 50 << 20;
  facts.tensor_tflops = 4096.0 * 132 * 1.98e9 * 1e-12;
  facts.read_gbytes_per_s = 0.9 * 2 * 2.619 * 5120 / 8;
  return facts;
}

// The same chip with more and faster memory, and more of the L2 cache.
inline CudaFacts h200() {
  CudaFacts facts = h100();
  facts.name = "NVIDIA H200";
  facts.l2_bytes = 60 << 20;
  facts.read_gbytes_per_s = 0.9 * 2 * 3.201 * 6016 / 8;
  return facts;
}

}  // namespace wh
