// The kernels of CUDA, and memory of the first GPU.
#include <cuda_runtime_api.h>

#include <limits>

#include "support/kernels_under_test.h"

namespace wh {

std::vector<const char*> kernels_under_test() {
  return {"sm90_prefill", "sm90_prefill_wide", "sm90_decode", "cuda_portable", "cuda_unfused"};
}

std::string why_not_here(const std::string& kernel) {
  int count = 0, major = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return "no GPU";
  EXPECT_EQ(cudaSetDevice(0), cudaSuccess);
  EXPECT_EQ(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), cudaSuccess);
  return kernel.rfind("sm90", 0) == 0 && major != 9 ? "no Hopper GPU" : "";
}

namespace {

// A thousand problems, each with its ten tensors: memory from a pool that gives nothing back takes
// microseconds in place of a tenth of a millisecond.
bool keep_freed_memory() {
  cudaMemPool_t pool = nullptr;
  uint64_t kept_bytes = std::numeric_limits<uint64_t>::max();
  EXPECT_EQ(cudaDeviceGetDefaultMemPool(&pool, 0), cudaSuccess);
  EXPECT_EQ(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept_bytes),
            cudaSuccess);
  return true;
}

}  // namespace

// In the order of the default stream, as everything here. An allocation that fails is a failure.
Placed::Placed(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  [[maybe_unused]] static const bool keeps = keep_freed_memory();
  EXPECT_EQ(cudaMallocAsync(&data_, bytes, nullptr), cudaSuccess) << bytes << " bytes";
  EXPECT_EQ(cudaMemsetAsync(data_, 0xff, bytes, nullptr), cudaSuccess);
}
Placed::Placed(const std::vector<std::byte>& bytes) : Placed(bytes.size()) {
  if (size_ == 0) return;
  EXPECT_EQ(cudaMemcpy(data_, bytes.data(), size_, cudaMemcpyDefault), cudaSuccess);
}
Placed::~Placed() {
  if (data_ != nullptr) cudaFreeAsync(data_, nullptr);
}

std::vector<std::byte> Placed::fetch() const {
  std::vector<std::byte> to(size_);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(cudaMemcpy(to.data(), data_, size_, cudaMemcpyDefault), cudaSuccess);
  return to;
}

}  // namespace wh
