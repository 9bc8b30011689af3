// The kernels of CUDA, and memory of the first GPU.
#include <cuda_runtime_api.h>

#include "kernels_under_test.h"

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

// An allocation that fails is a failure.
Placed::Placed(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  EXPECT_EQ(cudaMalloc(&data_, bytes), cudaSuccess) << bytes << " bytes";
  EXPECT_EQ(cudaMemset(data_, 0xff, bytes), cudaSuccess);
}
Placed::Placed(const std::vector<std::byte>& bytes) : Placed(bytes.size()) {
  if (size_ == 0) return;
  EXPECT_EQ(cudaMemcpy(data_, bytes.data(), size_, cudaMemcpyDefault), cudaSuccess);
}
Placed::~Placed() { cudaFree(data_); }

std::vector<std::byte> Placed::fetch() const {
  std::vector<std::byte> to(size_);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(cudaMemcpy(to.data(), data_, size_, cudaMemcpyDefault), cudaSuccess);
  return to;
}

}  // namespace wh
