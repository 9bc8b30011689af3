// The kernels that a test program is about and the memory that they read: widehead_tests and
// widehead_thread_tests have the CPU's (host_kernels.cpp), widehead_gpu_tests those of CUDA
// (gpu_kernels.cpp).
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace wh {

std::vector<const char*> kernels_under_test();

// Empty where this machine can run the kernel.
std::string why_not_here(const std::string& kernel);

// Bytes where a kernel reads and writes them.
class Placed {
 public:
  explicit Placed(size_t bytes);  // all 0xff: NaN of every type
  explicit Placed(const std::vector<std::byte>& bytes);
  ~Placed();
  Placed(const Placed&) = delete;
  Placed& operator=(const Placed&) = delete;

  void* data() const { return data_; }  // aligned to 64 bytes; null when there are none
  std::vector<std::byte> fetch() const;

 private:
  size_t size_;
  void* data_ = nullptr;
};

inline bool is_cuda(const std::string& kernel) { return kernel.rfind("cpu_", 0) != 0; }
int32_t device_of(const std::string& kernel);

// Of enum wh_dtype.
bool takes(const std::string& kernel, int32_t dtype);
std::vector<int32_t> dtypes_of(const std::string& kernel);

// A test that is run with the name of every kernel.
class KernelTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (const std::string why = why_not_here(GetParam()); !why.empty()) GTEST_SKIP() << why;
  }
  // A shape that the kernel takes: cpu_decode takes few rows, and few are what decode is for.
  static int64_t queries() {
    return std::string(GetParam()).find("decode") == std::string::npos ? 70 : 4;
  }
};

inline std::string kernel_name(const testing::TestParamInfo<const char*>& info) {
  return info.param;
}

}  // namespace wh
