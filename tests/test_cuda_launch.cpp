// What a launch decides by what its kernel was compiled for, checked without a GPU.
#include <gtest/gtest.h>

#include "cuda/common/launch.h"

namespace wh::cuda {
namespace {

TEST(CudaLaunch, OnlyCodeThatWaitsMayStartBeforeTheKernelInFrontEnds) {
  EXPECT_TRUE((LoadedCode{90, 90}).waits_for_front());
  EXPECT_TRUE((LoadedCode{120, 120}).waits_for_front());
  EXPECT_TRUE((LoadedCode{120, 90}).waits_for_front());  // translated, from PTX that has the wait
  // A build for sm_80 and sm_86 on an H100: machine code of sm_90, made from PTX that has none.
  EXPECT_FALSE((LoadedCode{90, 80}).waits_for_front());
  EXPECT_FALSE((LoadedCode{120, 86}).waits_for_front());
  EXPECT_FALSE((LoadedCode{80, 80}).waits_for_front());
  EXPECT_FALSE((LoadedCode{86, 86}).waits_for_front());
}

TEST(CudaLaunch, SaysWhatWasTranslated) {
  EXPECT_FALSE((LoadedCode{90, 90}).is_translated());
  EXPECT_TRUE((LoadedCode{90, 80}).is_translated());
  EXPECT_TRUE((LoadedCode{120, 90}).is_translated());
}

}  // namespace
}  // namespace wh::cuda
