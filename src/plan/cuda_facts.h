// What the planner knows of a CUDA device. Injectable, so that tests can plan for any card.
#pragma once

#include <cstdint>
#include <string>

namespace wh {

struct CudaFacts {
  std::string unavailable;  // why no kernel can run there; empty: it can
  std::string name;
  std::string driver;  // its version, "13.0"
  int32_t index = 0;
  int32_t compute_capability = 0;  // 90 for sm_90
  int32_t sms = 0;
  int64_t shared_bytes = 0;  // that one block may opt in to
  int64_t l2_bytes = 0;
  double tensor_tflops = 0;  // dense bf16
  double read_gbytes_per_s = 0;
  // Kernels choose only what this build has compiled of src/cuda/instances.json. A plan for a card
  // that is not there may choose all of it.
  bool only_compiled = false;
};

// Those of device `index` as the driver numbers them; queried once per device, never throws. A
// build without CUDA, a machine without a driver and an index out of range answer with
// `unavailable`.
const CudaFacts& cuda_facts(int32_t index);

}  // namespace wh
