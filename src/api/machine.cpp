#include "api/machine.h"

#include "api/profile_store.h"
#include "cpu/registry.h"
#include "cuda/device.h"
#include "cuda/registry.h"

namespace wh {

std::span<const Kernel* const> kernels_of(Device device) {
  return device == Device::kCpu ? cpu::kernels() : cuda::kernels();
}

Machine this_machine(Device device, int32_t device_index) {
  // Asking for a CUDA device starts the driver: a CPU problem must not pay for that.
  static const CudaFacts none;
  const CudaFacts& cuda = device == Device::kCuda ? cuda_facts(device_index) : none;
  if (!cuda.unavailable.empty()) return {cpu_facts(), cuda, kernels_of(device)};
  const LoadedProfile& loaded = loaded_profile(device, device_index);
  return {cpu_facts(), cuda, kernels_of(device), loaded.is_valid ? &loaded.profile : nullptr,
          loaded.description};
}

Status run_kernel(const std::string& name, const Launch& launch) {
  const Problem& p = launch.problem;
  const Kernel* kernel = find_kernel(kernels_of(p.device), name);
  Tensors tensors = launch.tensors;
  if (p.values_in_keys) tensors.v = tensors.k;
  const Launch whole{p, launch.config, tensors, launch.executor, launch.progress, launch.stream};
  if (p.device == Device::kCpu) return kernel->run(whole);
  const cuda::DeviceScope scope(p.device_index);
  if (Status status = scope.status(); !status.ok()) return status;
  return kernel->run(whole);
}

}  // namespace wh
