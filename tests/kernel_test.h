// A test that is run with the name of every CPU kernel.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "attention.h"
#include "plan/cpu_facts.h"

namespace wh {

constexpr const char* kCpuKernels[] = {"cpu_prefill", "cpu_prefill_bf16", "cpu_decode",
                                       "cpu_unfused", "cpu_reference"};

inline std::string kernel_name(const testing::TestParamInfo<const char*>& info) {
  return info.param;
}

class KernelTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (is_bf16_kernel(GetParam()) && !cpu_facts().has_avx512_bf16) {
      GTEST_SKIP() << "this CPU has no AVX512-BF16";
    }
  }
  // A shape that the kernel takes: decode takes few rows.
  static int64_t queries() { return std::string(GetParam()) == "cpu_decode" ? 4 : 70; }
};

}  // namespace wh
