#include "cuda/allocate.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "cuda/common/launch.h"
#include "cuda/device.h"

namespace wh::cuda {

Result<void*> allocate(int32_t device_index, size_t bytes, void* stream) {
  const DeviceScope scope(device_index);
  if (!scope.status().ok()) return scope.status();
  void* data = nullptr;
  const cudaError_t error = cudaMallocAsync(&data, bytes, static_cast<cudaStream_t>(stream));
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it is reported here, not at the next launch
    return Status(Code::kOutOfMemory,
                  fmt::format("no memory for {} bytes on cuda:{}", bytes, device_index));
  }
  if (error != cudaSuccess) return cuda_status(error, "cudaMallocAsync");
  return data;
}

void release(void* data, void* stream) noexcept {
  cudaFreeAsync(data, static_cast<cudaStream_t>(stream));
}

Status copy(void* to, const void* from, size_t bytes, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (Status status = cuda_status(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, cuda_stream),
                                  "cudaMemcpyAsync");
      !status.ok()) {
    return status;
  }
  return synchronize(stream);
}

Status synchronize(void* stream) {
  return cuda_status(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)),
                     "cudaStreamSynchronize");
}

}  // namespace wh::cuda
