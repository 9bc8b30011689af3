// cpu_prefill_bf16 where the planner should not have sent it.
#include <gtest/gtest.h>
#include <hwy/targets.h>

#include "api/machine.h"

namespace wh {
namespace {

TEST(PrefillBf16, AnswersWithAnErrorWhereItHasNoCode) {
  const int64_t before = hwy::SupportedTargets();
  // None at all would mean every target.
  hwy::SetSupportedTargetsForTest((before & ~((int64_t{HWY_AVX3} << 1) - 1)) | HWY_STATIC_TARGET);
  const Problem p;
  const Tensors t;
  Progress progress;
  const Status status = find_kernel(kernels_of(Device::kCpu), "cpu_prefill_bf16")
                            ->run({p, {}, t, default_executor(), progress});
  hwy::SetSupportedTargetsForTest(before);
  EXPECT_EQ(status.code(), Code::kInternal);
  EXPECT_NE(status.message().find("has no code for "), std::string::npos) << status.message();
}

}  // namespace
}  // namespace wh
