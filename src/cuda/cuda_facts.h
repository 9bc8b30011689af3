// What the planner knows of a CUDA device.
#pragma once

#include "plan/kernel.h"

namespace wh {

struct CudaFacts : DeviceFacts {
  std::string driver;  // its version, "13.0"
  int32_t index = 0;
  int32_t compute_capability = 0;  // 90 for sm_90
  int32_t sms = 0;
  int64_t shared_bytes = 0;  // that one block may opt in to
  // Kernels choose only what this build has compiled of src/cuda/instances.json. A plan for a card
  // that is not there may choose all of it.
  bool only_compiled = false;
};

// Those of device `index` as the driver numbers them; queried once per device, never throws. A
// build without CUDA, a machine without a driver and an index out of range answer with
// `unavailable`.
const CudaFacts& cuda_facts(int32_t index);

// What a CUDA kernel is asked with.
inline const CudaFacts& cuda_facts(const Query& query) {
  return static_cast<const CudaFacts&>(query.facts);
}

}  // namespace wh
