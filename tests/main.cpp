// gtest's main, plus `--simd_target=AVX2` (Highway's names), so that every path that this CPU can
// run is tested and not only the best one.
#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <cstdio>
#include <cstring>
#include <string>

namespace {

bool use_target(const std::string& name) {
  for (int64_t targets = hwy::SupportedTargets() & HWY_TARGETS; targets != 0;
       targets &= targets - 1) {
    const int64_t target = targets & -targets;
    if (name != hwy::TargetName(target)) continue;
    hwy::SetSupportedTargetsForTest(target);
    return true;
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  constexpr const char* kFlag = "--simd_target=";
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], kFlag, std::strlen(kFlag)) != 0) continue;
    const std::string name = argv[i] + std::strlen(kFlag);
    if (!use_target(name)) {
      std::printf("this CPU or this build has no %s; nothing is tested\n", name.c_str());
      return 77;  // CTest's SKIP_RETURN_CODE
    }
  }
  return RUN_ALL_TESTS();
}
