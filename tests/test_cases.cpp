// Every kernel on every case of the table that it does not refuse, and the planner's own choice.
#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <thread>

#include "api/machine.h"
#include "plan/cpu_facts.h"
#include "run_case.h"

namespace wh {
namespace {

struct Tally {
  int64_t checked = 0, refused = 0;
  double worst_rms = 0;  // over its tolerance
};

void check(CaseSet set) {
  const std::vector<Case> cases = make_cases(set, Device::kCpu, 20240229);
  std::vector<std::string> kernels{""};
  for (const Kernel* kernel : kernels_of(Device::kCpu)) kernels.push_back(kernel->name);
  std::map<std::string, Tally> tallies;
  int64_t wrong = 0;
  for (const Case& c : cases) {
    ASSERT_TRUE(validate(c.problem).ok()) << c.name << validate(c.problem).message();
    CaseData data(c);
    const Expected expected = expected_answer(data);
    for (const std::string& kernel : kernels) {
      const CaseResult result = run_case(c, data, expected, kernel);
      Tally& tally = tallies[kernel];
      if (result.was_refused) {
        ++tally.refused;
        continue;
      }
      ++tally.checked;
      if (result.tolerance > 0) {
        tally.worst_rms = std::max(tally.worst_rms, result.relative_rms / result.tolerance);
      }
      EXPECT_FALSE(result.is_wrong())
          << c.name << "\n  " << result.kernel << ": " << result.message;
      if (result.is_wrong() && ++wrong == 20) FAIL() << "20 wrong cases; the rest is not run";
    }
  }
  for (const auto& [kernel, tally] : tallies) {
    std::printf("%-18s %6ld checked, %5ld refused, worst error %.2f of its tolerance\n",
                kernel.empty() ? "(planner's choice)" : kernel.c_str(),
                static_cast<long>(tally.checked), static_cast<long>(tally.refused),
                tally.worst_rms);
    // Every kernel runs but one that is for an instruction set which not every machine has.
    const bool can_run = kernel != "cpu_prefill_bf16" || cpu_facts().has_avx512_bf16;
    EXPECT_EQ(tally.checked > 0, can_run) << kernel;
  }
}

TEST(Cases, Smoke) { check(CaseSet::kSmoke); }
TEST(Cases, Ci) { check(CaseSet::kCi); }
TEST(Cases, Corner) { check(CaseSet::kCorner); }

}  // namespace
}  // namespace wh
