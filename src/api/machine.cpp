#include "api/machine.h"

#include "api/profile_store.h"
#include "cpu/backend.h"
#include "cuda/backend.h"

namespace wh {

const Backend& backend(Device device) {
  switch (device) {
    case Device::kCpu:
      return cpu::backend();
    case Device::kCuda:
      break;
  }
  return cuda::backend();
}

std::span<const Kernel* const> kernels_of(Device device) { return backend(device).kernels(); }

Machine this_machine(Device device, int32_t device_index) {
  // Asking for a CUDA device starts the driver: a CPU problem must not pay for that.
  static const CudaFacts none;
  const CudaFacts& cuda = device == Device::kCuda ? cuda_facts(device_index) : none;
  if (!cuda.unavailable.empty()) return {cpu_facts(), cuda, kernels_of(device)};
  const LoadedProfile& loaded = loaded_profile(device, device_index);
  return {cpu_facts(), cuda, kernels_of(device), loaded.is_valid ? &loaded.profile : nullptr,
          loaded.description};
}

}  // namespace wh
