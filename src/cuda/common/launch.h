// Launches with the status of the library instead of the runtime's.
#pragma once

#include <cuda_runtime_api.h>

#include "core/status.h"

namespace wh::cuda {

// kDeviceError with the call's name and the runtime's text, or ok.
Status cuda_status(cudaError_t error, const char* call);

struct KernelLaunch {
  const void* function;
  int blocks;
  int threads;
  int shared_bytes;  // dynamic; above 48 KB the kernel is told so, once a device
  int cluster = 1;   // blocks of a cluster
  // Its blocks may start while the kernel in front still runs; they wait for it themselves before
  // they touch memory (ptx::wait_for_dependency). Nothing of that on cards that cannot.
  bool overlaps_front = false;
  void** parameters;
  cudaStream_t stream;
};
Status launch_kernel(const KernelLaunch& launch);

}  // namespace wh::cuda
