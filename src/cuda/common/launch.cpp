#include "cuda/common/launch.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <utility>

namespace wh::cuda {
namespace {

constexpr int kSharedBytesOfAll = 48 << 10;

// What the runtime knows of a kernel on a device, asked for once: each question takes 1 us.
class LoadedKernels {
 public:
  // Allows the kernel its shared memory: as much as any launch of it has asked for, which problems
  // decide for some. Less than before is never set: another thread may be about to launch.
  Result<LoadedCode> code_of(const KernelLaunch& launch) {
    int device = 0;
    if (Status status = cuda_status(cudaGetDevice(&device), "cudaGetDevice"); !status.ok()) {
      return status;
    }
    const std::pair key{launch.function, device};
    {
      const std::shared_lock lock(mutex_);
      const auto found = known_.find(key);
      if (found != known_.end() && launch.shared_bytes <= found->second.shared_bytes) {
        return found->second.code;
      }
    }
    const std::unique_lock lock(mutex_);
    const auto found = known_.find(key);
    const int allowed = found == known_.end() ? kSharedBytesOfAll : found->second.shared_bytes;
    if (launch.shared_bytes > allowed) {
      WH_RETURN_IF_ERROR(cuda_status(
          cudaFuncSetAttribute(launch.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               launch.shared_bytes),
          "cudaFuncSetAttribute"));
    }
    const Result<LoadedCode> code = loaded_code(launch.function);
    if (code.ok()) {
      known_.insert_or_assign(key, Known{*code, std::max(allowed, launch.shared_bytes)});
    }
    return code;
  }

 private:
  struct Known {
    LoadedCode code;
    int shared_bytes;  // allowed
  };
  std::shared_mutex mutex_;
  std::map<std::pair<const void*, int>, Known> known_;
};

}  // namespace

Status cuda_status(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return {};
  return {Code::kDeviceError,
          fmt::format("{}: {} ({})", call, cudaGetErrorString(error), cudaGetErrorName(error))};
}

Result<LoadedCode> loaded_code(const void* function) {
  cudaFuncAttributes attributes{};
  WH_RETURN_IF_ERROR(
      cuda_status(cudaFuncGetAttributes(&attributes, function), "cudaFuncGetAttributes"));
  return LoadedCode{attributes.binaryVersion, attributes.ptxVersion};
}

Status launch_kernel(const KernelLaunch& launch) {
  static LoadedKernels kernels;
  bool overlaps_front = false;
  if (launch.shared_bytes > kSharedBytesOfAll || launch.overlaps_front) {
    const Result<LoadedCode> code = kernels.code_of(launch);
    if (!code.ok()) return code.status();
    overlaps_front = launch.overlaps_front && code->waits_for_front();
  }
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (launch.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = static_cast<unsigned>(launch.cluster);
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (overlaps_front) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(launch.blocks));
  config.blockDim = dim3(static_cast<unsigned>(launch.threads));
  config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
  config.stream = launch.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cuda_status(cudaLaunchKernelExC(&config, launch.function, launch.parameters),
                     "cudaLaunchKernelExC");
}

}  // namespace wh::cuda
