#include "cuda/common/launch.h"

#include <fmt/format.h>

#include <mutex>
#include <set>
#include <shared_mutex>
#include <utility>

#include "plan/cuda_facts.h"

namespace wh::cuda {
namespace {

constexpr int kSharedBytesOfAll = 48 << 10;

// Kernels that may use more than 48 KB, by device: the attribute costs 1 us a call.
class SharedMemoryOptIns {
 public:
  Status allow(const KernelLaunch& launch) {
    int device = 0;
    if (Status status = cuda_status(cudaGetDevice(&device), "cudaGetDevice"); !status.ok()) {
      return status;
    }
    const std::pair key{launch.function, device};
    {
      const std::shared_lock lock(mutex_);
      if (done_.contains(key)) return {};
    }
    const std::unique_lock lock(mutex_);
    Status status = cuda_status(
        cudaFuncSetAttribute(launch.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             launch.shared_bytes),
        "cudaFuncSetAttribute");
    if (status.ok()) done_.insert(key);
    return status;
  }

 private:
  std::shared_mutex mutex_;
  std::set<std::pair<const void*, int>> done_;
};

// Programmatic dependent launch came with sm_90.
bool can_overlap() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess && cuda_facts(device).compute_capability >= 90;
}

}  // namespace

Status cuda_status(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return {};
  return {Code::kDeviceError,
          fmt::format("{}: {} ({})", call, cudaGetErrorString(error), cudaGetErrorName(error))};
}

Status launch_kernel(const KernelLaunch& launch) {
  static SharedMemoryOptIns opt_ins;
  if (launch.shared_bytes > kSharedBytesOfAll) {
    if (Status status = opt_ins.allow(launch); !status.ok()) return status;
  }
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (launch.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = static_cast<unsigned>(launch.cluster);
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (launch.overlaps_front && can_overlap()) {
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
