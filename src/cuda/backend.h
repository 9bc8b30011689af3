// NVIDIA GPUs; in a build without CUDA, why there are none.
#pragma once

#include <cstdint>
#include <string>

#include "plan/backend.h"

namespace wh::cuda {

const Backend& backend();

// What this build has for a device. Asking loads the library's code onto it.
struct BuildFacts {
  std::string instances;  // WIDEHEAD_CUDA_INSTANCES: "all" or "ci"
  std::string code;       // of cuda_portable: machine code, or PTX that the driver translates
};
Result<BuildFacts> build_facts(int32_t device_index);

}  // namespace wh::cuda
