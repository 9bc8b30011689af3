// Every kernel on every case of the table, and the planner's own choice.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <map>

#include "api/machine.h"
#include "cpu/cpu_facts.h"
#include "documented.h"
#include "run_case.h"

namespace wh {
namespace {

// On some case at least: one kernel is for an instruction set which not every machine has.
bool is_documented_to_run(const std::vector<Case>& cases, const std::string& kernel) {
  return kernel.empty() || std::any_of(cases.begin(), cases.end(), [&](const Case& c) {
           return Documented{c.problem, c.limits.precision, cpu_facts()}.takes(kernel);
         });
}

void check(const std::vector<Case>& cases, const std::vector<std::string>& kernels) {
  const CheckOptions options;
  std::map<std::string, Tally> tallies;
  int64_t wrong = 0;
  for (const Case& c : cases) {
    ASSERT_TRUE(validate(c.problem).ok()) << c.name << validate(c.problem).message();
    CheckedCase checked(c, options);
    for (const std::string& kernel : kernels) {
      const CaseResult result = checked.run(kernel);
      tallies[kernel].add(result);
      const bool is_wrong = result.outcome == Outcome::kWrong;
      EXPECT_FALSE(is_wrong) << c.name << "\n  " << result.kernel << ": " << result.message;
      if (is_wrong && ++wrong == 20) FAIL() << "20 wrong cases; the rest is not run";
    }
  }
  for (const auto& [kernel, tally] : tallies) {
    std::printf("%-18s %6ld checked, %5ld refused, worst error %.2f of its tolerance\n",
                kernel.empty() ? "(planner's choice)" : kernel.c_str(),
                static_cast<long>(tally.checked), static_cast<long>(tally.refused),
                tally.worst_share);
    EXPECT_EQ(tally.checked > 0, is_documented_to_run(cases, kernel)) << kernel;
  }
}

void check(CaseSet set, size_t most_cases = std::numeric_limits<size_t>::max()) {
  std::vector<std::string> kernels = kernels_for(Device::kCpu, set);
  kernels.insert(kernels.begin(), "");
  std::vector<Case> cases = make_cases(set, Device::kCpu, 20240229);
  cases.resize(std::min(cases.size(), most_cases));
  check(cases, kernels);
}

TEST(Cases, Smoke) { check(CaseSet::kSmoke); }
TEST(Cases, SmokeLayouts) { check(CaseSet::kLayouts, 150); }
TEST(Cases, Layouts) { check(CaseSet::kLayouts); }
TEST(Cases, Ragged) { check(CaseSet::kRagged); }
TEST(Cases, Ci) { check(CaseSet::kCi); }
TEST(Cases, Corner) { check(CaseSet::kCorner); }

// The sampling of rows and every field of the large cases, at sizes that a CPU does in no time.
TEST(Cases, LargeShrunk) {
  constexpr int64_t kShrink = 32;
  check(make_large_cases(Device::kCpu, 20240229, kShrink),
        kernels_for(Device::kCpu, CaseSet::kLarge));
}

}  // namespace
}  // namespace wh
