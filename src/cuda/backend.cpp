#include "cuda/backend.h"

#include <fmt/format.h>

#include "cuda/allocate.h"
#include "cuda/combine/append.h"
#include "cuda/combine/merge.h"
#include "cuda/common/launch.h"
#include "cuda/cuda_facts.h"
#include "cuda/device.h"
#include "cuda/instances.h"
#include "cuda/portable/few_rows.h"
#include "cuda/registry.h"
#include "cuda/replay.h"

namespace wh::cuda {
namespace {

// Of cuda_portable, which every build has for all cards; or why it cannot be loaded.
std::string code_of(int32_t device_index) {
  const DeviceScope scope(device_index);
  if (Status status = scope.status(); !status.ok()) return status.message();
  const Result<LoadedCode> code = loaded_code(few_rows_instance<64, 1>(false));
  if (!code.ok()) return code.status().message();
  return code->is_translated() ? fmt::format("translated from PTX of sm_{}", code->ptx_version)
                               : fmt::format("machine code of sm_{}", code->binary_version);
}

class CudaBackend final : public Backend {
 public:
  const char* label() const override { return "CUDA"; }

  std::span<const Kernel* const> kernels() const override { return cuda::kernels(); }

  const DeviceFacts& facts(int32_t device_index) const override { return cuda_facts(device_index); }
  void write_facts(int32_t device_index, JsonWriter& json) const override {
    const CudaFacts& cuda = cuda_facts(device_index);
    json.write("name", cuda.name);
    json.write("index", cuda.index);
    json.write("compute_capability", cuda.compute_capability);
    json.write("sms", cuda.sms);
    json.write("shared_bytes", cuda.shared_bytes);
    json.write("l2_bytes", cuda.l2_bytes);
    json.write("tensor_tflops", cuda.tensor_tflops);
    json.write("read_gbytes_per_s", cuda.read_gbytes_per_s);
  }
  std::vector<std::pair<std::string, std::string>> build_facts(
      int32_t device_index) const override {
    return {{"code", code_of(device_index)}, {"instances", kBuiltInstances}};
  }
  ProfileIdentity identity(int32_t device_index) const override {
    const CudaFacts& cuda = cuda_facts(device_index);
    return {cuda.name, fmt::format("sm_{}", cuda.compute_capability), cuda.driver, cuda.sms, ""};
  }

  bool is_host() const override { return false; }

  Result<void*> allocate(DeviceStream on, size_t bytes) const override {
    return cuda::allocate(on, bytes);
  }
  void release(DeviceStream on, void* data) const noexcept override { cuda::release(on, data); }
  Status copy(DeviceStream on, void* to, const void* from, size_t bytes) const override {
    return cuda::copy(on, to, from, bytes);
  }
  Status copy(DeviceStream on, const TensorCopy& copy, const Executor&) const override {
    return cuda::copy(on, copy);
  }
  Status write(DeviceStream on, void* to, std::span<const int32_t> numbers) const override {
    return cuda::write(on, to, numbers);
  }
  Status synchronize(DeviceStream on) const override { return cuda::synchronize(on); }

  Status check(const Problem& problem, const Tensors& tensors, void* stream) const override {
    WH_RETURN_IF_ERROR(check_stream(problem.device_index, stream));
    return check_pointers(problem, tensors);
  }
  Status run(const Kernel& kernel, const Launch& launch) const override {
    const DeviceScope scope(launch.problem.device_index);
    WH_RETURN_IF_ERROR(scope.status());
    return kernel.run(launch);
  }
  Status merge(const OutputMerge& merge, const Executor&, DeviceStream on) const override {
    return cuda::merge(merge, on);
  }
  Status append(const KvAppend& append, const Executor&, DeviceStream on) const override {
    return cuda::append(append, on);
  }
  Result<std::unique_ptr<Replay>> capture(
      int32_t device_index, const std::function<Status(void* stream)>& call) const override {
    return cuda::capture(device_index, call);
  }
};

}  // namespace

const Backend& backend() {
  static const CudaBackend the;
  return the;
}

}  // namespace wh::cuda
