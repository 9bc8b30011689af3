// The CUDA backend of a build without CUDA: it has no kernels and says why.
#include "cuda/backend.h"

#include "cuda/cuda_facts.h"

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
namespace {

Status refused() { return {Code::kRefused, cuda_facts(0).unavailable}; }

class NoBackend final : public Backend {
 public:
  const char* label() const override { return "CUDA"; }

  std::span<const Kernel* const> kernels() const override { return {}; }

  const DeviceFacts& facts(int32_t device_index) const override { return cuda_facts(device_index); }
  void write_facts(int32_t, JsonWriter&) const override {}
  ProfileIdentity identity(int32_t) const override { return {}; }

  bool is_host() const override { return false; }

  Result<void*> allocate(DeviceStream, size_t) const override { return refused(); }
  void release(DeviceStream, void*) const noexcept override {}
  Status copy(DeviceStream, void*, const void*, size_t) const override { return refused(); }
  Status copy(DeviceStream, const TensorCopy&, const Executor&) const override { return refused(); }
  Status write(DeviceStream, void*, std::span<const int32_t>) const override { return refused(); }
  Status synchronize(DeviceStream) const override { return refused(); }

  Status check(const Problem&, const Tensors&, void*) const override { return refused(); }
  Status run(const Kernel&, const Launch&) const override { return refused(); }
  Status merge(const OutputMerge&, const Executor&, DeviceStream) const override {
    return refused();
  }
  Status append(const KvAppend&, const Executor&, DeviceStream) const override { return refused(); }
  Result<std::unique_ptr<Replay>> capture(
      int32_t, const std::function<Status(void* stream)>&) const override {
    return refused();
  }
};

}  // namespace

const Backend& backend() {
  static const NoBackend the;
  return the;
}

}  // namespace cuda
}  // namespace wh
