#include "api/machine.h"

#include "api/profile_store.h"
#include "core/names.h"
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
  const DeviceFacts& facts = backend(device).facts(device_index);
  if (!facts.unavailable.empty()) return {facts, kernels_of(device)};
  const LoadedProfile& loaded = loaded_profile(device, device_index);
  return {facts, kernels_of(device), loaded.is_valid ? &loaded.profile : nullptr,
          loaded.description};
}

std::string device_name(Device device, int32_t device_index) {
  const std::string name = kDevices.name(device);
  return backend(device).is_host() ? name : name + ":" + std::to_string(device_index);
}

}  // namespace wh
