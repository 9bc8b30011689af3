// Cards that people plan for without having one, as the driver describes them.
#pragma once

#include <array>

#include "cuda/cuda_facts.h"

namespace wh {

struct KnownCard {
  const char* name;
  CudaFacts facts;
};

inline std::array<KnownCard, 2> known_cards() {
  CudaFacts h100;
  h100.name = "NVIDIA H100 80GB HBM3";
  h100.compute_capability = 90;
  h100.shared_bytes = 232448;
  h100.sms = 132;
  h100.l2_bytes = 50 << 20;
  h100.tensor_tflops = 4096.0 * 132 * 1.98e9 * 1e-12;
  h100.read_gbytes_per_s = 0.9 * 2 * 2.619 * 5120 / 8;
  // The same chip with more and faster memory, and more of the L2 cache.
  CudaFacts h200 = h100;
  h200.name = "NVIDIA H200";
  h200.l2_bytes = 60 << 20;
  h200.read_gbytes_per_s = 0.9 * 2 * 3.201 * 6016 / 8;
  return {{{"h100", h100}, {"h200", h200}}};
}

}  // namespace wh
