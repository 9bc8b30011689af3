// Launches with the status of the library instead of the runtime's.
#pragma once

#include <cuda_runtime_api.h>

#include "core/status.h"

namespace wh::cuda {

// kDeviceError with the call's name and the runtime's text, or ok.
Status cuda_status(cudaError_t error, const char* call);

// What the loaded code of a kernel was compiled for, as cudaFuncAttributes has it: 90 for sm_90.
struct LoadedCode {
  int binary_version;  // the machine code; the driver's translation of PTX is for the card itself
  int ptx_version;     // the PTX that it was made from, by ptxas or by the driver

  // By the driver, because the build has no machine code for the card.
  constexpr bool is_translated() const { return binary_version != ptx_version; }
  // Whether ptx::wait_for_dependency() is in it. __CUDA_ARCH__ was the PTX's: on a card of 9.0, PTX
  // of 8.0 is machine code of sm_90 that never waits.
  constexpr bool waits_for_front() const { return binary_version >= 90 && ptx_version >= 90; }
};
Result<LoadedCode> loaded_code(const void* function);

struct KernelLaunch {
  const void* function;
  int blocks;
  int threads;
  int shared_bytes;  // dynamic; above 48 KB the kernel is told so
  int cluster = 1;   // blocks of a cluster
  // Its blocks may start while the kernel in front still runs; they wait for it themselves before
  // they touch memory (ptx::wait_for_dependency). Launched so only where the loaded code does wait.
  // The kernel in front may be of any code: one that never lets the next start early lets it start
  // at its end.
  bool overlaps_front = false;
  void** parameters;
  cudaStream_t stream;
};
Status launch_kernel(const KernelLaunch& launch);

}  // namespace wh::cuda
