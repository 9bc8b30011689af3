#include "cuda/allocate.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <map>
#include <mutex>

#include "cuda/common/launch.h"
#include "cuda/device.h"

namespace wh::cuda {
namespace {

cudaStream_t stream_of(DeviceStream on) { return static_cast<cudaStream_t>(on.stream); }

// Lets this thread call what is not work on a stream while one is captured in a graph.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// A pool of each device. The device's default pool gives memory back whenever the host program
// synchronises, once a decoded token: mapping it anew takes longer than the attention it is for. It
// belongs to the host program, too, and so does its threshold. This one keeps what the split keys
// of a decode leave behind (160 shares of 64 rows of 512 columns are 21 MB) and returns the rest,
// the scores of cuda_unfused above all, at the next synchronisation.
class Pools {
 public:
  Result<cudaMemPool_t> of(int32_t device_index) {
    const std::lock_guard lock(mutex_);
    cudaMemPool_t& pool = pools_[device_index];
    if (pool != nullptr) return pool;
    const RelaxedCapture relaxed;  // the first call may be one that is captured
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location = {cudaMemLocationTypeDevice, device_index};
    cudaMemPool_t made = nullptr;
    if (Status status = cuda_status(cudaMemPoolCreate(&made, &properties), "cudaMemPoolCreate");
        !status.ok()) {
      return status;
    }
    uint64_t kept_bytes = uint64_t{32} << 20;
    if (Status status =
            cuda_status(cudaMemPoolSetAttribute(made, cudaMemPoolAttrReleaseThreshold, &kept_bytes),
                        "cudaMemPoolSetAttribute");
        !status.ok()) {
      cudaMemPoolDestroy(made);
      return status;
    }
    pool = made;
    return pool;
  }

 private:
  std::mutex mutex_;
  std::map<int32_t, cudaMemPool_t> pools_;  // until the process ends: the driver may end before us
};

}  // namespace

Result<void*> allocate(DeviceStream on, size_t bytes) {
  static Pools pools;
  const DeviceScope scope(on.device_index);
  if (Status status = scope.status(); !status.ok()) return status;
  const Result<cudaMemPool_t> pool = pools.of(on.device_index);
  if (!pool.ok()) return pool.status();
  void* data = nullptr;
  const cudaError_t error = cudaMallocFromPoolAsync(&data, bytes, *pool, stream_of(on));
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it is reported here, not at the next launch
    return Status(Code::kOutOfMemory,
                  fmt::format("no memory for {} bytes on cuda:{}", bytes, on.device_index));
  }
  if (error != cudaSuccess) return cuda_status(error, "cudaMallocFromPoolAsync");
  return data;
}

// Freed in the order of another device's default stream, it could be handed out again while kernels
// still use it.
void release(DeviceStream on, void* data) noexcept {
  const DeviceScope scope(on.device_index);
  cudaFreeAsync(data, stream_of(on));
}

Status copy(DeviceStream on, void* to, const void* from, size_t bytes) {
  const DeviceScope scope(on.device_index);
  if (Status status = scope.status(); !status.ok()) return status;
  if (Status status = cuda_status(
          cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_of(on)), "cudaMemcpyAsync");
      !status.ok()) {
    return status;
  }
  return synchronize(on);
}

Status write(DeviceStream on, void* to, std::span<const int32_t> numbers) {
  const DeviceScope scope(on.device_index);
  WH_RETURN_IF_ERROR(scope.status());
  return cuda_status(cudaMemcpyAsync(to, numbers.data(), numbers.size_bytes(),
                                     cudaMemcpyHostToDevice, static_cast<cudaStream_t>(on.stream)),
                     "cudaMemcpyAsync");
}

Status copy(DeviceStream on, const TensorCopy& c) {
  const DeviceScope scope(on.device_index);
  WH_RETURN_IF_ERROR(scope.status());
  // Rows of the longer of heads and length in one call.
  const auto& e = c.extents;
  const int outer = e[1] <= e[2] ? 1 : 2, inner = 3 - outer;
  const auto bytes = [&](int64_t elements) {
    return static_cast<size_t>(elements * c.element_bytes);
  };
  const size_t width = bytes(e[3]);
  const auto pitch = [&](const Strides& strides) {
    return e[inner] > 1 ? bytes(strides[static_cast<size_t>(inner)]) : width;
  };
  for (int64_t b = 0; b < e[0]; ++b) {
    for (int64_t i = 0; i < e[static_cast<size_t>(outer)]; ++i) {
      const auto offset = [&](const Strides& s) {
        return bytes(b * s[0] + i * s[static_cast<size_t>(outer)]);
      };
      WH_RETURN_IF_ERROR(cuda_status(
          cudaMemcpy2DAsync(static_cast<std::byte*>(c.to) + offset(c.stride_to), pitch(c.stride_to),
                            static_cast<const std::byte*>(c.from) + offset(c.stride_from),
                            pitch(c.stride_from), width, static_cast<size_t>(e[inner]),
                            cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(on.stream)),
          "cudaMemcpy2DAsync"));
    }
  }
  return {};
}

Status synchronize(DeviceStream on) {
  const DeviceScope scope(on.device_index);
  if (Status status = scope.status(); !status.ok()) return status;
  return cuda_status(cudaStreamSynchronize(stream_of(on)), "cudaStreamSynchronize");
}

}  // namespace wh::cuda
