#include "plan/kernel.h"

namespace wh {

const Kernel* find_kernel(std::span<const Kernel* const> kernels, const std::string& name) {
  for (const Kernel* kernel : kernels) {
    if (name == kernel->name) return kernel;
  }
  return nullptr;
}

}  // namespace wh
