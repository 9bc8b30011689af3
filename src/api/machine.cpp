#include "api/machine.h"

#include "cpu/registry.h"
#include "cuda/registry.h"

namespace wh {

std::span<const Kernel* const> kernels_of(Device device) {
  return device == Device::kCpu ? cpu::kernels() : cuda::kernels();
}

Machine this_machine(Device device, int32_t device_index) {
  // Asking for a CUDA device starts the driver: a CPU problem must not pay for that.
  static const CudaFacts none;
  return {cpu_facts(), device == Device::kCuda ? cuda_facts(device_index) : none,
          kernels_of(device)};
}

}  // namespace wh
