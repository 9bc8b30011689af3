// Every backward kernel on the case table, against float64, and what must hold beside.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <map>
#include <random>
#include <span>

#include "api/machine.h"
#include "api/run.h"
#include "core/carver.h"
#include "plan/explain.h"
#include "plan/plan_json.h"
#include "plan/planner.h"
#include "run_case.h"
#include "support/problems.h"
#include "verify/elements.h"
#include "verify/execution.h"
#include "verify/gradients.h"
#include "widehead/widehead.hpp"

namespace wh {
namespace {

constexpr const char* kFused = "cpu_backward";
constexpr const char* kOracle = "cpu_reference_backward";

// The kernel on these tensors, in a workspace of NaN between guards.
Result<Execution> prepare(const std::string& kernel, Limits limits, GradientTensors& data) {
  limits.kernel = kernel;
  Result<Plan> plan = make_plan(data.problem(), limits, this_machine(Device::kCpu, 0));
  if (!plan.ok()) return plan.status();
  data.poison_outputs();
  return Execution::prepare(*plan, data.tensors(),
                            {.guard_bytes = GuardedTensor::kGuardBytes, .paints_workspace = true});
}

// Dense ones, and packed ones.
std::vector<Case> smoke_cases(uint64_t seed) {
  std::vector<Case> cases = make_cases(CaseSet::kSmoke, Device::kCpu, seed);
  const std::vector<Case> layouts = make_cases(CaseSet::kLayouts, Device::kCpu, seed);
  cases.insert(cases.end(), layouts.begin(), layouts.begin() + 150);
  return cases;
}

// Runs it. Empty: all is well so far.
std::string run(const std::string& kernel, const Limits& limits, GradientTensors& data) {
  Result<Execution> execution = prepare(kernel, limits, data);
  if (!execution.ok()) return execution.status().message();
  if (Status status = execution->run(); !status.ok()) return status.message();
  const Result<bool> intact = execution->guards_intact();
  if (!intact.ok()) return intact.status().message();
  if (!*intact) return "memory around the workspace was written";
  return data.damage();
}

void check(const std::vector<Case>& cases) {
  const CheckOptions options;
  std::map<std::string, Tally> tallies;
  int64_t wrong = 0;
  for (const Case& c : cases) {
    CheckedCase checked(c, options, Pass::kBackward);
    ASSERT_TRUE(validate(checked.problem()).ok()) << c.name;
    for (const std::string& kernel : kernels_for(Device::kCpu, CaseSet::kCi, Pass::kBackward)) {
      const CaseResult result = checked.run(kernel);
      tallies[kernel].add(result);
      const bool is_wrong = result.outcome == Outcome::kWrong;
      EXPECT_FALSE(is_wrong) << c.name << "\n  " << kernel << ": " << result.message;
      if (is_wrong && ++wrong == 20) FAIL() << "20 wrong cases; the rest is not run";
    }
  }
  for (const auto& [kernel, tally] : tallies) {
    std::printf("%-24s %6ld checked, worst error %.2f of its tolerance\n", kernel.c_str(),
                static_cast<long>(tally.checked), tally.worst_share);
    EXPECT_EQ(tally.checked, static_cast<int64_t>(cases.size())) << kernel;
  }
}

TEST(Gradients, Smoke) { check(make_cases(CaseSet::kSmoke, Device::kCpu, 20240229)); }
TEST(Gradients, Ci) {
  std::vector<Case> cases = make_cases(CaseSet::kCi, Device::kCpu, 20261129);
  cases.resize(2200);
  check(cases);
}
// Packed queries and keys: sequences of no queries or no keys, and tokens that are nobody's.
TEST(Gradients, Layouts) { check(make_cases(CaseSet::kLayouts, Device::kCpu, 20261129)); }
TEST(Gradients, Corner) { check(make_cases(CaseSet::kCorner, Device::kCpu, 20240229)); }

// The table's sizes are within a tile or two; these are over several of each.
TEST(Gradients, LargeShrunk) {
  std::vector<Case> cases = make_large_cases(Device::kCpu, 20240229, 128);
  for (Case& c : cases) c.sampled_rows = 0;
  check(cases);
}
// Gradients that are sampled, after a run of the forward pass.
TEST(Gradients, LargeSampled) { check(make_large_cases(Device::kCpu, 20240229, 64)); }

// A sample is summed from out and log-sum-exp, all gradients are from q, k and v: each is held to
// the oracle's run.
TEST(Gradients, ASampleIsOfTheSameGradients) {
  int64_t compared = 0;
  for (const Case& c : smoke_cases(3)) {
    if (c.has_visible_nan) continue;
    GradientTensors data(c);
    ASSERT_EQ(run(kOracle, c.limits, data), "") << c.name;
    const ExpectedGradients few(data, 5), all(data, int64_t{1} << 40);
    for (const ExpectedGradients* expected : {&few, &all}) {
      EXPECT_EQ(expected->compare(data).message, "") << c.name;
    }
    EXPECT_LE(few.compared_rows(), 5);
    EXPECT_LE(few.compared_keys(), 5);
    // What is wrong in a row that is compared, is noticed.
    const Problem& p = data.problem();
    const Tensors t = data.tensors();
    if (gradient_rows(p, t) == 0 || gradient_keys(p, t) == 0) continue;
    const auto spoil = [&](void* to, Dtype dtype) {
      put(static_cast<std::byte*>(to), dtype, 0, 1e3f);
    };
    spoil(t.dq, p.dtype_q);
    EXPECT_NE(few.compare(data).message.find("dq[0, 0, 0, 0]"), std::string::npos) << c.name;
    ASSERT_EQ(run(kOracle, c.limits, data), "") << c.name;
    spoil(t.dk, p.dtype_kv);
    EXPECT_NE(few.compare(data).message.find("dk[0, 0, 0, 0]"), std::string::npos) << c.name;
    ++compared;
  }
  EXPECT_GT(compared, 270);
}

TEST(Gradients, SameBitsForAnyThreadsAndRun) {
  int64_t compared = 0;
  for (const Case& c : smoke_cases(7)) {
    GradientTensors data(c);
    std::vector<std::byte> first;
    for (const int32_t threads : {1, 2, 3, 7, 16, 3}) {
      Limits limits = c.limits;
      limits.threads = threads;
      ASSERT_EQ(run(kFused, limits, data), "") << c.name;
      if (first.empty()) first = data.answer();
      ASSERT_TRUE(data.answer() == first) << c.name << " on " << threads << " threads";
      ++compared;
    }
  }
  EXPECT_EQ(compared, 2100);
}

// A plan is for the most that there will be: the sequences of a smaller batch have the same bits as
// in the larger one, in less workspace than was planned.
TEST(Gradients, OnePlanRunsSmallerBatches) {
  int64_t compared = 0;
  for (const Case& c : make_cases(CaseSet::kLayouts, Device::kCpu, 11)) {
    GradientTensors data(c);
    const Problem& p = data.problem();
    if (p.batch < 3 || p.query_layout != QueryLayout::kPacked || compared == 100) continue;
    if (p.key_layout != KeyLayout::kPacked) continue;
    Result<Execution> execution = prepare(kFused, c.limits, data);
    ASSERT_TRUE(execution.ok()) << execution.status().message();
    ASSERT_TRUE(execution->run().ok());
    const auto gradients = [&] {
      Tensors t = data.tensors();
      const int64_t rows = t.query_offsets[p.batch - 2], keys = t.key_offsets[p.batch - 2];
      std::vector<float> values;
      const auto add = [&](const void* from, Dtype dtype, const Strides& stride, int64_t heads,
                           int64_t tokens, int64_t dim) {
        for (int64_t i = 0; i < tokens * heads * dim; ++i) {
          const int64_t d = i % dim, head = i / dim % heads, token = i / dim / heads;
          values.push_back(load_element(from, dtype, offset_of(stride, 0, head, token, d)));
        }
      };
      add(t.dq, p.dtype_q, p.stride_dq, p.heads_q, rows, p.dim_qk);
      add(t.dk, p.dtype_kv, p.stride_dk, p.heads_kv, keys, p.dim_qk);
      if (!p.values_in_keys) add(t.dv, p.dtype_kv, p.stride_dv, p.heads_kv, keys, p.dim_v);
      return values;
    };
    const std::vector<float> whole = gradients();
    data.poison_outputs();
    Tensors t = data.tensors();
    t.batch = p.batch - 2;
    t.total_q = std::max<int32_t>(1, t.query_offsets[t.batch]);
    const Plan& plan = execution->plan();
    const Kernel& kernel = *find_kernel(kernels_of(Device::kCpu), plan.kernel);
    const Result<Problem> smaller = problem_of_run(p, t);
    ASSERT_TRUE(smaller.ok()) << smaller.status().message();
    EXPECT_LE(kernel.workspace_bytes(*smaller, plan.config), plan.workspace_bytes) << c.name;
    std::vector<std::byte> workspace(plan.workspace_bytes + kWorkspaceAlignment, std::byte{0xff});
    const auto address = reinterpret_cast<uintptr_t>(workspace.data());
    t.workspace = workspace.data() + (kWorkspaceAlignment - address % kWorkspaceAlignment);
    t.workspace_bytes = plan.workspace_bytes;
    const Status status = run_plan(plan, t, {});
    ASSERT_TRUE(status.ok()) << c.name << status.message();
    const std::vector<float> part = gradients();
    EXPECT_TRUE(std::ranges::equal(std::as_bytes(std::span(part)), std::as_bytes(std::span(whole))))
        << c.name;
    ++compared;
  }
  EXPECT_GT(compared, 50);
}

// What is planned follows the tokens, not the longest sequence times their number.
TEST(Gradients, WorkspaceOfPackedQueriesFollowsTheirTokens) {
  Problem p;
  p.batch = 64;
  p.heads_q = p.heads_kv = 4;
  p.len_q = p.len_k = 4096;
  p.total_q = p.total_k = 8192;
  p.query_layout = QueryLayout::kPacked;
  p.key_layout = KeyLayout::kPacked;
  p.dim_qk = p.dim_v = 64;
  set_dense(p);
  p = backward_of(p);
  const auto bytes_of = [](const Problem& problem) {
    Limits limits;
    limits.kernel = kFused;
    limits.threads = 2;
    const Result<Plan> plan = make_plan(problem, limits, this_machine(Device::kCpu, 0));
    EXPECT_TRUE(plan.ok()) << plan.status().message();
    return plan->workspace_bytes;
  };
  Problem dense = p;
  dense.query_layout = QueryLayout::kDense;
  dense.key_layout = KeyLayout::kDense;
  dense.total_q = dense.total_k = 0;
  dense.batch = 2;  // as many tokens
  set_dense(dense);
  dense = backward_of(dense);
  EXPECT_LT(bytes_of(p), bytes_of(dense) * 1.2);
}

// Nor is what is estimated: an item of a sequence that has no keys there ends at once.
TEST(Gradients, EstimateOfPackedQueriesFollowsTheirTokens) {
  Problem p;
  p.len_q = p.len_k = 512;
  p.dim_qk = p.dim_v = 64;
  const auto us_of = [&](int64_t batch, QueryLayout queries, KeyLayout keys, int64_t total) {
    Problem changed = p;
    changed.batch = batch;
    changed.query_layout = queries;
    changed.key_layout = keys;
    changed.total_q = changed.total_k = total;
    set_dense(changed);
    Limits limits;
    limits.kernel = kFused;
    limits.threads = 2;
    const auto plan = make_plan(backward_of(changed), limits, this_machine(Device::kCpu, 0));
    EXPECT_TRUE(plan.ok()) << plan.status().message();
    return plan->estimated_us;
  };
  const double packed = us_of(512, QueryLayout::kPacked, KeyLayout::kPacked, 1024);
  EXPECT_LT(packed, us_of(2, QueryLayout::kDense, KeyLayout::kDense, 0) * 1.35);
}

// Two heads over one, all that attention has but lengths, on tensors of a caller.
struct Layer {
  static constexpr int64_t kQueries = 5, kKeys = 7, kDim = 6, kDimV = 4;
  std::vector<float> q, k, v, mask, sinks;
  std::vector<float> out = std::vector<float>(2 * kQueries * kDimV);
  std::vector<float> lse = std::vector<float>(2 * kQueries);
  std::vector<float> d_out, dq, dk, dv, d_sinks = std::vector<float>(2);
  widehead::Options options{.softcap = 2, .causal = widehead::Causal::kBottomRight};

  Layer() {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    for (const auto& [to, count] : {std::pair{&q, 2 * kQueries * kDim},
                                    {&k, kKeys * kDim},
                                    {&v, kKeys * kDimV},
                                    {&mask, kQueries * kKeys},
                                    {&sinks, int64_t{2}},
                                    {&d_out, 2 * kQueries * kDimV}}) {
      for (int64_t i = 0; i < count; ++i) to->push_back(normal(random));
    }
    dq.resize(q.size());
    dk.resize(k.size());
    dv.resize(v.size());
    options.mask =
        widehead::MaskView{mask.data(), widehead::MaskKind::kAdditiveF32, {0, 0, kKeys, 1}};
    options.sinks = sinks.data();
    options.log_sum_exp = lse.data();
  }

  static widehead::TensorView view(std::vector<float>& data, int64_t heads, int64_t length) {
    const int64_t dim = static_cast<int64_t>(data.size()) / heads / length;
    return {data.data(), widehead::Dtype::kF32, {1, heads, length, dim}};
  }
  void forward() {
    widehead::attention(view(q, 2, kQueries), view(k, 1, kKeys), view(v, 1, kKeys),
                        view(out, 2, kQueries), options);
  }
  void backward(const widehead::RunOptions& run = {}) {
    widehead::backward(view(q, 2, kQueries), view(k, 1, kKeys), view(v, 1, kKeys),
                       view(out, 2, kQueries), gradients(), options, {.threads = 2}, run);
  }
  widehead::Gradients gradients() {
    return {view(d_out, 2, kQueries), view(dq, 2, kQueries), view(dk, 1, kKeys), view(dv, 1, kKeys),
            d_sinks.data()};
  }
  double loss() {
    forward();
    double sum = 0;
    for (size_t i = 0; i < out.size(); ++i) sum += static_cast<double>(out[i]) * d_out[i];
    return sum;
  }
};

// Two sequences in one call of C++, each as if it were alone.
TEST(Gradients, OfPackedSequencesAreThoseOfEach) {
  constexpr int64_t kHeads = 2, kDim = 6;
  const std::vector<int32_t> query_offsets{0, 4, 9}, key_offsets{0, 7, 10};
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  const auto drawn = [&](int64_t tokens) {
    std::vector<float> values(static_cast<size_t>(tokens * kHeads * kDim));
    for (float& value : values) value = normal(random);
    return values;
  };
  std::vector<float> q = drawn(9), k = drawn(10), v = drawn(10), d_out = drawn(9), out = drawn(9),
                     lse(9 * kHeads);
  std::vector<float> dq = drawn(9), dk = drawn(10), dv = drawn(10);
  const auto view = [&](std::vector<float>& data, int64_t first, int64_t tokens) {
    return widehead::packed(data.data() + first * kHeads * kDim, widehead::Dtype::kF32, tokens,
                            kHeads, kDim);
  };
  const auto run = [&](int64_t first_q, int64_t len_q, int64_t first_k, int64_t len_k,
                       const widehead::Options& options) {
    const auto of_q = [&](std::vector<float>& data) { return view(data, first_q, len_q); };
    const auto of_k = [&](std::vector<float>& data) { return view(data, first_k, len_k); };
    widehead::attention(of_q(q), of_k(k), of_k(v), of_q(out), options);
    widehead::backward(of_q(q), of_k(k), of_k(v), of_q(out),
                       {of_q(d_out), of_q(dq), of_k(dk), of_k(dv)}, options);
  };
  widehead::Options options{.causal = widehead::Causal::kBottomRight};
  options.log_sum_exp = lse.data();
  for (size_t b = 0; b < 2; ++b) {
    run(query_offsets[b], query_offsets[b + 1] - query_offsets[b], key_offsets[b],
        key_offsets[b + 1] - key_offsets[b], options);
  }
  const std::vector<float> alone[] = {dq, dk, dv};
  for (std::vector<float>* gradient : {&dq, &dk, &dv}) {
    std::fill(gradient->begin(), gradient->end(), std::numeric_limits<float>::quiet_NaN());
  }
  options.sequences = {{.batch = 2,
                        .len_q = 5,
                        .len_k = 7,
                        .query_offsets = query_offsets.data(),
                        .key_offsets = key_offsets.data()}};
  run(0, 9, 0, 10, options);
  const std::vector<float> packed[] = {dq, dk, dv};
  for (size_t i = 0; i < 3; ++i) {
    for (size_t j = 0; j < alone[i].size(); ++j) {
      EXPECT_NEAR(packed[i][j], alone[i][j], 1e-5) << i << ", " << j;
    }
  }
}

TEST(Gradients, AreTheSlopesOfTheForwardPass) {
  Layer layer;
  layer.forward();
  layer.backward();
  constexpr float kStep = 1e-2f;
  for (const auto& [input, gradient] : {std::pair{&layer.q, &layer.dq},
                                        {&layer.k, &layer.dk},
                                        {&layer.v, &layer.dv},
                                        {&layer.sinks, &layer.d_sinks}}) {
    for (size_t i = 0; i < input->size(); ++i) {
      const float value = (*input)[i];
      (*input)[i] = value + kStep;
      const double above = layer.loss();
      (*input)[i] = value - kStep;
      const double below = layer.loss();
      (*input)[i] = value;
      EXPECT_NEAR((*gradient)[i], (above - below) / (2 * kStep), 2e-3) << i;
    }
  }
}

TEST(Gradients, NanReachesWhatSeesItAndNothingElse) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  for (std::vector<float> Layer::*tensor : {&Layer::q, &Layer::d_out}) {
    Layer layer;
    // The first query sees keys 0 to 2.
    (layer.*tensor)[1] = kNan;
    layer.forward();
    layer.backward();
    EXPECT_TRUE(std::isnan(layer.dq[0]));
    for (int64_t key = 0; key < Layer::kKeys; ++key) {
      EXPECT_EQ(std::isnan(layer.dk[static_cast<size_t>(key * Layer::kDim + 1)]), key < 3) << key;
    }
    for (size_t i = Layer::kDim; i < layer.dq.size(); ++i) EXPECT_FALSE(std::isnan(layer.dq[i]));
    EXPECT_TRUE(std::isnan(layer.d_sinks[0]));
    EXPECT_FALSE(std::isnan(layer.d_sinks[1]));
  }
}

TEST(Gradients, OfRowsThatSeeNothingAreZeroWhateverTheirOutputs) {
  Layer layer;
  const int32_t length = 3;  // the first two queries see nothing but the sink
  layer.options.key_lengths = &length;
  for (int64_t key = length * Layer::kDim; key < Layer::kKeys * Layer::kDim; ++key) {
    layer.k[static_cast<size_t>(key)] = std::numeric_limits<float>::quiet_NaN();
  }
  layer.forward();
  layer.backward();
  for (size_t i = 0; i < 2 * Layer::kDim; ++i) EXPECT_EQ(layer.dq[i], 0.0f);
  EXPECT_NE(layer.dq[2 * Layer::kDim], 0.0f);
  for (size_t i = length * Layer::kDim; i < layer.dk.size(); ++i) EXPECT_EQ(layer.dk[i], 0.0f);
  for (size_t i = length * Layer::kDimV; i < layer.dv.size(); ++i) EXPECT_EQ(layer.dv[i], 0.0f);
}

TEST(Gradients, ReportTheirProgressAndStop) {
  const Case c = make_cases(CaseSet::kCorner, Device::kCpu, 1)[1];
  GradientTensors data(c);
  struct Watcher {
    double cancel_at, last = 0;
    static int32_t look(void* context, double fraction) {
      auto& self = *static_cast<Watcher*>(context);
      EXPECT_GE(fraction, self.last);
      self.last = fraction;
      return fraction >= self.cancel_at ? 1 : 0;
    }
  };
  for (const char* name : {kFused, kOracle}) {
    Limits limits;
    limits.threads = 2;
    Result<Execution> execution = prepare(name, limits, data);
    ASSERT_TRUE(execution.ok()) << execution.status().message();
    for (const double cancel_at : {2.0, 0.4}) {
      Watcher watcher{cancel_at};
      const Status status =
          execution->run({.progress = Watcher::look, .progress_context = &watcher});
      if (cancel_at > 1) {
        EXPECT_TRUE(status.ok()) << status.message();
        EXPECT_EQ(watcher.last, 1) << name;
      } else {
        EXPECT_EQ(status.code(), Code::kCancelled);
        EXPECT_NE(status.message().find("the gradients are"), std::string::npos)
            << status.message();
        EXPECT_LT(watcher.last, 0.7) << name;
      }
    }
  }
}

TEST(Gradients, APlanSaysItsPassAndSurvivesItsJson) {
  Layer layer;
  const auto q = layer.view(layer.q, 2, Layer::kQueries), k = layer.view(layer.k, 1, Layer::kKeys),
             v = layer.view(layer.v, 1, Layer::kKeys),
             out = layer.view(layer.out, 2, Layer::kQueries);
  const auto plan =
      widehead::plan(widehead::problem(q, k, v, out, layer.gradients(), layer.options));
  EXPECT_EQ(plan.kernel(), kFused);
  EXPECT_NE(plan.explain().find("backward"), std::string::npos) << plan.explain();
  EXPECT_EQ(plan.explain().find("cpu_prefill"), std::string::npos) << plan.explain();
  const auto again = widehead::Plan::from_json(plan.json());
  EXPECT_EQ(again.json(), plan.json());
  EXPECT_EQ(again.problem().pass, WH_BACKWARD);
  EXPECT_EQ(again.problem().stride_dk[2], Layer::kDim);
}

TEST(Gradients, WhatIsWrongWithACallIsNamed) {
  const auto message_of = [](auto&& change, const widehead::Limits& limits = {}) -> std::string {
    Layer layer;
    const auto q = layer.view(layer.q, 2, Layer::kQueries),
               k = layer.view(layer.k, 1, Layer::kKeys), v = layer.view(layer.v, 1, Layer::kKeys),
               out = layer.view(layer.out, 2, Layer::kQueries);
    auto problem = widehead::problem(q, k, v, out, layer.gradients(), layer.options);
    auto tensors = widehead::tensors(q, k, v, out, layer.gradients(), layer.options);
    layer.forward();
    change(problem, tensors);
    const wh_limits c_limits = limits.c_limits();
    return wh_attention(&problem, &c_limits, &tensors, nullptr) == WH_OK ? "" : wh_last_error();
  };
  EXPECT_EQ(message_of([](wh_problem&, wh_tensors&) {}), "");
  EXPECT_EQ(message_of([](wh_problem&, wh_tensors& t) { t.d_out = nullptr; }),
            "d_out is null; the problem says that it is used");
  EXPECT_EQ(message_of([](wh_problem&, wh_tensors& t) { t.log_sum_exp = nullptr; }),
            "log_sum_exp is null; the problem says that it is used");
  EXPECT_EQ(message_of([](wh_problem&, wh_tensors& t) { t.dk = nullptr; }),
            "dk is null; it must point to where the result goes");
  EXPECT_EQ(message_of([](wh_problem&, wh_tensors& t) { t.d_sinks = nullptr; }),
            "d_sinks is null; it must point to where the result goes");
  EXPECT_EQ(message_of([](wh_problem& p, wh_tensors&) { p.pass = 2; }),
            "pass is 2; it must be between 0 and 1");
  EXPECT_EQ(message_of([](wh_problem& p, wh_tensors&) { p.stride_dq[2] = 1; }),
            "stride_dq[3] is 1; elements of dq would overlap, it must be at least 5");
  EXPECT_NE(message_of([](wh_problem&, wh_tensors& t) { t.dv = t.dq; }).find("dq overlaps dv"),
            std::string::npos);
  EXPECT_EQ(message_of([](wh_problem&, wh_tensors&) {}, {.kernel = "cpu_prefill"}),
            "limits.kernel is \"cpu_prefill\", which has no backward pass; valid: cpu_backward, "
            "cpu_reference_backward");
  EXPECT_EQ(message_of([](wh_problem& p, wh_tensors&) { p.pass = WH_FORWARD; },
                       {.kernel = "cpu_backward"}),
            "limits.kernel is \"cpu_backward\", which has no forward pass; valid: "
            "cpu_prefill_bf16, cpu_prefill, cpu_decode, cpu_unfused, cpu_reference");
}

TEST(Gradients, ADeviceWithoutSuchKernelsSaysSo) {
  Problem p;
  p.device = Device::kCuda;
  p.pass = Pass::kBackward;
  p.len_q = p.len_k = p.dim_qk = p.dim_v = 8;
  p.scale = 1;
  p.stride_q = p.stride_k = p.stride_v = p.stride_out = dense_strides(1, 8, 8);
  p.stride_d_out = p.stride_dq = p.stride_dk = p.stride_dv = p.stride_q;
  const Kernel* forward = find_kernel(kernels_of(Device::kCpu), "cpu_prefill");
  const DeviceFacts card;
  const auto plan = make_plan(p, {}, {card, std::span(&forward, 1)});
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  EXPECT_FALSE(plan->runnable());
  ASSERT_EQ(plan->candidates.size(), 1u);
  EXPECT_EQ(plan->candidates[0].reason, "has no backward pass, as no kernel of this device yet");
}

}  // namespace
}  // namespace wh
