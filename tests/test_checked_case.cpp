// That the case table notices what a kernel does wrong: kernels that do so, one mistake each.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "api/machine.h"
#include "run_case.h"

namespace wh {
namespace {

const Kernel& honest() { return *find_kernel(kernels_of(Device::kCpu), "cpu_prefill"); }

// Rows of 64 f32 values, dense.
Case small_case() {
  Case c;
  Problem& p = c.problem;
  p.heads_q = p.heads_kv = 2;
  p.len_q = 40;
  p.len_k = 300;
  p.dim_qk = p.dim_v = 64;
  p.wants_log_sum_exp = true;
  set_dense(p);
  return c;
}

// cpu_prefill, and then `spoil`.
CaseResult run_spoilt(const Case& c, void (*spoil)(const Tensors&), const CheckOptions& options) {
  static void (*spoil_now)(const Tensors&);
  spoil_now = spoil;
  Kernel spoilt = honest();
  spoilt.run = [](const Launch& launch) {
    Status status = honest().run(launch);
    spoil_now(launch.tensors);
    return status;
  };
  const Kernel* const kernels[] = {&spoilt};
  const Machine here = this_machine(Device::kCpu, 0);
  CheckedCase checked(c, options);
  return checked.run("", {here.facts, kernels});
}

void expect_wrong(const CaseResult& result, const std::string& words) {
  EXPECT_EQ(result.outcome, Outcome::kWrong);
  EXPECT_NE(result.message.find(words), std::string::npos) << result.message;
}

float* out_of(const Tensors& t) { return static_cast<float*>(t.out); }

TEST(CheckedCase, NothingIsWrongWithAKernelThatIsRight) {
  const CheckOptions options{.runs = 3};
  const CaseResult result = run_spoilt(
      small_case(), [](const Tensors&) {}, options);
  EXPECT_EQ(result.outcome, Outcome::kRight) << result.message;
  EXPECT_GT(result.share_of_tolerance, 0);
}

TEST(CheckedCase, WrongNumbersAreNoticed) {
  const CheckOptions options;
  const Case c = small_case();
  expect_wrong(run_spoilt(
                   c, [](const Tensors& t) { out_of(t)[100] += 0.1f; }, options),
               "out[");
  expect_wrong(run_spoilt(
                   c, [](const Tensors& t) { t.log_sum_exp[7] += 1e-3f; }, options),
               "log_sum_exp of row 7");
}

TEST(CheckedCase, WritingWhereNothingMayBeWrittenIsNoticed) {
  const CheckOptions options;
  Case c = small_case();
  expect_wrong(run_spoilt(
                   c, [](const Tensors& t) { out_of(t)[-1] = 0; }, options),
               "memory around out");
  expect_wrong(run_spoilt(
                   c, [](const Tensors& t) { t.log_sum_exp[80] = 0; }, options),
               "memory around log_sum_exp");
  const auto writes_k = [](const Tensors& t) {
    static_cast<float*>(const_cast<void*>(t.k))[3] += 1;
  };
  expect_wrong(run_spoilt(c, writes_k, options), "k, or memory around it");
  const auto writes_beside_v = [](const Tensors& t) {
    static_cast<float*>(const_cast<void*>(t.v))[-2] = 0;
  };
  expect_wrong(run_spoilt(c, writes_beside_v, options), "v, or memory around it");
  c.problem.stride_out = {40 * 2 * 66, 40 * 66, 66, 1};
  expect_wrong(run_spoilt(
                   c, [](const Tensors& t) { out_of(t)[65] = 0; }, options),
               "between the elements of out");
}

TEST(CheckedCase, BitsThatChangeAreNoticed) {
  static int runs;
  runs = 0;
  const auto spoil = [](const Tensors& t) {
    float& value = out_of(t)[5];
    if (++runs == 4) value = std::nextafter(value, 1e9f);
  };
  expect_wrong(run_spoilt(small_case(), spoil, {.runs = 5}), "run 4 gave other bits");
}

// The row is not among those that are compared with float64: another kernel's answer shows it.
TEST(CheckedCase, AWrongRowBetweenTheSampledOnesIsNoticed) {
  Case c = small_case();
  c.sampled_rows = 2;
  const CheckOptions options;
  CheckedCase checked(c, options);
  const Machine here = this_machine(Device::kCpu, 0);
  Kernel spoilt = honest();
  spoilt.name = "cpu_unfused";
  spoilt.run = [](const Launch& launch) {
    Status status = honest().run(launch);
    std::memset(out_of(launch.tensors) + 20 * 64, 0, 64 * sizeof(float));
    return status;
  };
  const Kernel* const kernels[] = {&honest(), &spoilt};
  const Machine machine{here.facts, kernels};
  EXPECT_EQ(checked.run("cpu_prefill", machine).outcome, Outcome::kRight);
  expect_wrong(checked.run("cpu_unfused", machine), "out[0, 0, 20] is off");
}

TEST(CheckedCase, RefusalsAreHeldAgainstWhatIsDocumented) {
  const CheckOptions options;
  const Case c = small_case();
  CheckedCase checked(c, options);
  const Machine here = this_machine(Device::kCpu, 0);
  Kernel refuses = honest(), unknown = honest();
  refuses.refusal = [](const Query&) { return std::optional<std::string>("no"); };
  unknown.name = "cpu_unheard_of";
  const Kernel* const one[] = {&refuses};
  const Kernel* const other[] = {&unknown};
  expect_wrong(checked.run("cpu_prefill", {here.facts, one}), "documented to be taken");
  expect_wrong(checked.run("cpu_unheard_of", {here.facts, other}), "documented to be refused");
}

}  // namespace
}  // namespace wh
