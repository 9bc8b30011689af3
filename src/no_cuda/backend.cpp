// The CUDA backend of a build without CUDA: it has no kernels and says why.
#include "cuda/allocate.h"
#include "cuda/device.h"
#include "cuda/registry.h"
#include "plan/cuda_facts.h"

namespace wh {

const CudaFacts& cuda_facts(int32_t) {
  static const CudaFacts facts = [] {
    CudaFacts none;
    none.unavailable =
        "this build has no CUDA; configure with -DWIDEHEAD_CUDA=ON and a CUDA toolkit";
    return none;
  }();
  return facts;
}

namespace cuda {

std::span<const Kernel* const> kernels() { return {}; }

DeviceScope::DeviceScope(int32_t) : status_(Code::kRefused, cuda_facts(0).unavailable) {}
DeviceScope::~DeviceScope() = default;
Status check_pointers(const Problem&, const Tensors&) {
  return {Code::kRefused, cuda_facts(0).unavailable};
}

Result<void*> allocate(int32_t, size_t, void*) {
  return Status(Code::kRefused, cuda_facts(0).unavailable);
}
void release(void*, void*) noexcept {}
Status copy(void*, const void*, size_t, void*) {
  return {Code::kRefused, cuda_facts(0).unavailable};
}
Status synchronize(void*) { return {Code::kRefused, cuda_facts(0).unavailable}; }

}  // namespace cuda

}  // namespace wh
