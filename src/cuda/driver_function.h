// Functions of the driver, found through the runtime, so that the library does not link the driver
// and loads without one.
#pragma once

#include <cuda_runtime_api.h>

namespace wh::cuda {

// As that version of CUDA (12050: 12.5) declares it; null where the driver is older.
template <typename Function>
Function driver_function(const char* name, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Function>(function);
}

}  // namespace wh::cuda
