// The CUDA backend of a build without CUDA: it has no kernels and says why.
#include "cuda/allocate.h"
#include "cuda/device.h"
#include "cuda/registry.h"
#include "cuda/replay.h"
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

DeviceScope::DeviceScope(int32_t) noexcept {}
DeviceScope::~DeviceScope() = default;
Status DeviceScope::status() const { return {Code::kRefused, cuda_facts(0).unavailable}; }
Status check_pointers(const Problem&, const Tensors&) {
  return {Code::kRefused, cuda_facts(0).unavailable};
}

Status check_stream(const Problem&, void*) { return {Code::kRefused, cuda_facts(0).unavailable}; }

Result<void*> allocate(DeviceStream, size_t) {
  return Status(Code::kRefused, cuda_facts(0).unavailable);
}
void release(DeviceStream, void*) noexcept {}
Status copy(DeviceStream, void*, const void*, size_t) {
  return {Code::kRefused, cuda_facts(0).unavailable};
}
struct Replay::Graph {};
void Replay::Destroy::operator()(Graph* graph) const { delete graph; }
Result<Replay> Replay::capture(int32_t, const std::function<Status(void*)>&) {
  return Status(Code::kRefused, cuda_facts(0).unavailable);
}
Result<double> Replay::us() { return Status(Code::kRefused, cuda_facts(0).unavailable); }
Status synchronize(DeviceStream) { return {Code::kRefused, cuda_facts(0).unavailable}; }

}  // namespace cuda

}  // namespace wh
