// Plans for machines that need not exist: choices, reasons, budgets, JSON, profiles.
#include <gtest/gtest.h>

#include <cmath>

#include "api/environment.h"
#include "api/machine.h"
#include "api/profile_store.h"
#include "core/byte_size.h"
#include "core/key_range.h"
#include "core/names.h"
#include "core/nearest_name.h"
#include "cpu/cpu_facts.h"
#include "cuda/cuda_facts.h"
#include "plan/explain.h"
#include "plan/plan_json.h"
#include "plan/planner.h"
#include "plan/work.h"
#include "support/problems.h"

namespace wh {
namespace {

Problem chunk(int64_t len_k) { return chunk(len_k, Dtype::kF16, Device::kCpu); }

Result<Plan> plan(const Problem& problem, const Limits& limits) {
  return make_plan(problem, limits, this_machine(Device::kCpu, 0));
}

const Candidate& candidate(const Plan& plan, const std::string& kernel) {
  for (const Candidate& one : plan.candidates) {
    if (one.kernel == kernel) return one;
  }
  ADD_FAILURE() << "no candidate " << kernel;
  return plan.candidates.front();
}

TEST(Planner, FusedWorkspaceDoesNotGrowWithKeys) {
  const auto at_32k = plan(chunk(32768), {}), at_256k = plan(chunk(262144), {});
  ASSERT_TRUE(at_32k.ok() && at_256k.ok());
  EXPECT_EQ(at_256k->kernel, "cpu_prefill");
  EXPECT_LT(at_256k->workspace_bytes, uint64_t{16} << 20);
  EXPECT_LE(at_256k->workspace_bytes, at_32k->workspace_bytes);
  // One head's score matrix alone.
  EXPECT_GT(candidate(*at_256k, "cpu_unfused").workspace_bytes, uint64_t{2048} * 262144 * 4);
}

TEST(Planner, AnEmptyProblemGetsAnOrdinaryKernel) {
  for (const int field : {0, 1, 2}) {
    Problem p = chunk(field == 0 ? 0 : 100);
    p.len_q = field == 1 ? 0 : 4;
    p.batch = field == 2 ? 0 : 1;
    const auto made = plan(p, {});
    ASSERT_TRUE(made.ok());
    EXPECT_TRUE(made->kernel == "cpu_decode" || made->kernel == "cpu_prefill") << made->kernel;
    for (const Candidate& one : made->candidates) {
      EXPECT_EQ(one.estimated_us > 0, one.verdict != Verdict::kRefused) << one.kernel;
    }
    const std::string text = explain(*made);
    const std::string row = text.substr(text.find("\n" + made->kernel));
    EXPECT_EQ(row.substr(0, row.find('\n', 1)).find(" - "), std::string::npos) << text;
  }
}

TEST(Planner, EveryCandidateHasItsVerdict) {
  Limits limits;
  limits.workspace_bytes = 8 << 20;
  const auto made = plan(chunk(32768), limits);
  ASSERT_TRUE(made.ok());
  const auto kernels = kernels_of(Device::kCpu);
  ASSERT_EQ(made->candidates.size(),
            std::count_if(kernels.begin(), kernels.end(),
                          [](const Kernel* kernel) { return kernel->pass == Pass::kForward; }));
  EXPECT_EQ(candidate(*made, "cpu_prefill").verdict, Verdict::kChosen);
  EXPECT_EQ(candidate(*made, "cpu_decode").verdict, Verdict::kRefused);
  EXPECT_NE(candidate(*made, "cpu_decode").reason.find("65536"), std::string::npos);
  EXPECT_EQ(candidate(*made, "cpu_unfused").verdict, Verdict::kOverBudget);
  EXPECT_NE(candidate(*made, "cpu_unfused").reason.find("the limit is 8.00 MiB"),
            std::string::npos);
  EXPECT_EQ(candidate(*made, "cpu_reference").verdict, Verdict::kSlower);
  const std::string text = explain(*made);
  for (const Candidate& one : made->candidates) {
    EXPECT_NE(text.find(one.kernel), std::string::npos);
    EXPECT_NE(text.find(one.reason), std::string::npos);
  }
}

TEST(Planner, ABudgetThatNothingFitsListsWhatEachWanted) {
  Limits limits;
  limits.workspace_bytes = 1000;
  const auto made = plan(chunk(32768), limits);
  ASSERT_TRUE(made.ok());
  EXPECT_FALSE(made->runnable());
  const Status status = runnable_status(*made);
  EXPECT_EQ(status.code(), Code::kRefused);
  for (const char* wanted : {"cpu_prefill: wants", "cpu_unfused: wants", "cpu_reference: wants",
                             "cpu_decode: takes at most"}) {
    EXPECT_NE(status.message().find(wanted), std::string::npos) << status.message();
  }
}

TEST(Planner, PoliciesDecideWhatMayRun) {
  Limits limits;
  limits.policy = Policy::kFusedAbove;
  EXPECT_EQ(plan(chunk(16384), limits)->kernel, "cpu_prefill");
  EXPECT_EQ(plan(chunk(16383), limits)->kernel, "cpu_unfused");
  limits.fused_above = 0;
  EXPECT_EQ(plan(chunk(16), limits)->kernel, "cpu_prefill");
  limits = {};
  limits.policy = Policy::kFused;
  limits.workspace_bytes = 1000;
  EXPECT_FALSE(plan(chunk(32768), limits)->runnable());
  limits = {};
  limits.kernel = "cpu_unfused";
  const auto forced = plan(chunk(512), limits);
  EXPECT_EQ(forced->kernel, "cpu_unfused");
  EXPECT_EQ(candidate(*forced, "cpu_prefill").reason, "the caller forces cpu_unfused");
}

TEST(Planner, AnUnknownKernelIsAnErrorThatSuggestsOne) {
  Limits limits;
  limits.kernel = "cpu_prefil";
  const auto made = plan(chunk(512), limits);
  ASSERT_FALSE(made.ok());
  EXPECT_EQ(made.status().code(), Code::kInvalidArgument);
  EXPECT_NE(made.status().message().find("did you mean \"cpu_prefill\"?"), std::string::npos);
}

TEST(Planner, TheLongestStepCostsNothingOrRefuses) {
  Limits limits;
  limits.longest_step_us = 50e3;
  const auto any = plan(chunk(200000), {}), made = plan(chunk(200000), limits);
  ASSERT_TRUE(made.ok() && made->runnable());
  EXPECT_EQ(made->kernel, "cpu_prefill");
  EXPECT_EQ(made->config, any->config);
  EXPECT_EQ(made->workspace_bytes, any->workspace_bytes);
  for (const char* kernel : {"cpu_unfused", "cpu_reference"}) {
    const std::string& reason = candidate(*made, kernel).reason;
    EXPECT_NE(reason.find("its longest step takes about "), std::string::npos) << reason;
    EXPECT_NE(reason.find("ms, the limit is 50 ms"), std::string::npos) << reason;
  }
  limits.longest_step_us = 1;
  for (const int64_t window : {kUnlimited, int64_t{100}}) {
    Problem p = chunk(200000);
    p.window_left = window;
    const auto refused = plan(p, limits);
    ASSERT_TRUE(refused.ok());
    EXPECT_FALSE(refused->runnable());
    EXPECT_NE(candidate(*refused, "cpu_prefill").reason.find("us, the limit is 1 us"),
              std::string::npos)
        << candidate(*refused, "cpu_prefill").reason;
  }
}

// More work in a step takes longer, and nothing but the step counts.
TEST(Planner, AStepGrowsWithItsRowsAndNotWithTheKeys) {
  const Kernel* prefill = find_kernel(kernels_of(Device::kCpu), "cpu_prefill");
  const auto step_us = [&](int64_t len_q, int64_t len_k, int32_t threads) {
    Problem p = chunk(len_k);
    p.len_q = len_q;
    Limits limits;
    limits.threads = threads;
    const Machine machine = this_machine(Device::kCpu, 0);
    const Query query{p, limits, machine.facts};
    return prefill->step_us(query, prefill->configure(query));
  };
  EXPECT_NEAR(step_us(2048, 32768, 1), step_us(2048, 262144, 1), 1);
  EXPECT_GT(step_us(2048, 32768, 1), 2 * step_us(1, 4096, 1));
  const int32_t cores = this_machine(Device::kCpu, 0).facts.cores;
  EXPECT_GT(step_us(2048, 32768, 4 * cores), 3 * step_us(2048, 32768, cores));
}

int64_t partial_bytes(const Plan& plan) {
  const Problem& p = plan.problem;
  const int64_t chunk_keys = plan.config.chunk_keys;
  if (chunk_keys == 0) return 0;
  return (p.len_k + chunk_keys - 1) / chunk_keys * p.batch * p.heads_q * p.len_q * (p.dim_v + 2) *
         4;
}

Problem eight_heads(int64_t heads_kv, int64_t len_q, int64_t len_k, int64_t dim) {
  Problem p = chunk(len_k);
  p.heads_q = 8;
  p.heads_kv = heads_kv;
  p.len_q = len_q;
  p.dim_qk = p.dim_v = dim;
  p.stride_q = p.stride_out = dense_strides(8, len_q, dim);
  p.stride_k = p.stride_v = dense_strides(heads_kv, len_k, dim);
  return p;
}

TEST(Planner, KeysAreSplitForFewRowsOnlyAndIntoFewBytes) {
  Limits limits;
  limits.kernel = "cpu_prefill";
  int64_t split = 0;
  for (const int64_t heads_kv : {1, 2, 8}) {
    for (const int64_t len_q : {1, 30, 128, 512, 2048, 16384}) {
      for (const int64_t len_k : {100, 4096, 16384, 262144}) {
        for (const int64_t dim : {64, 256, 1024}) {
          Problem p = eight_heads(heads_kv, len_q, len_k, dim);
          limits.threads = 1;
          const auto made = plan(p, limits);
          ASSERT_TRUE(made.ok() && made->runnable());
          split += made->config.chunk_keys > 0 ? 1 : 0;
          EXPECT_LE(partial_bytes(*made), 8 << 20) << describe(p);
          if (8 * len_q >= 64 * 144) {
            EXPECT_EQ(made->config.chunk_keys, 0) << describe(p);
          }
          limits.threads = 64;
          EXPECT_EQ(plan(p, limits)->config.chunk_keys, made->config.chunk_keys) << describe(p);
          limits.batch_invariant = true;
          const int64_t alone = plan(p, limits)->config.chunk_keys;
          p.batch = 16;
          EXPECT_EQ(plan(p, limits)->config.chunk_keys, alone) << describe(p);
          limits.batch_invariant = false;
        }
      }
    }
  }
  EXPECT_GT(split, 0) << "nothing was split: the test tests nothing";
}

CpuFacts server() {
  CpuFacts cpu;
  cpu.name = "a server";
  cpu.isa = "AVX3";
  cpu.simd_floats = 16;
  cpu.cores = 64;
  cpu.l2_bytes = 2 << 20;
  cpu.gflops_per_core = 120;
  cpu.read_gbytes_per_s = 300;
  cpu.has_cblas = true;
  return cpu;
}

CpuFacts laptop() {
  CpuFacts cpu = server();
  cpu.name = "a laptop";
  cpu.isa = "AVX2";
  cpu.simd_floats = 8;
  cpu.cores = 4;
  cpu.read_gbytes_per_s = 30;
  return cpu;
}

// Four queries of four heads each, a step that verifies speculated tokens: on AVX2 cpu_decode takes
// 0.7 to 0.8 of cpu_prefill's time there. Of 64 rows of one kv head it makes one item, for one
// core.
TEST(Planner, AFewSpeculatedTokensAreDecodedOnAvx2) {
  const Machine machine{laptop(), kernels_of(Device::kCpu)};
  for (const int64_t dim : {128, 256}) {
    for (const int64_t len_k : {512, 8192}) {
      EXPECT_EQ(make_plan(eight_heads(2, 4, len_k, dim), {}, machine)->kernel, "cpu_decode")
          << "dim " << dim << ", " << len_k << " keys";
    }
    EXPECT_EQ(make_plan(eight_heads(1, 8, 2048, dim), {}, machine)->kernel, "cpu_prefill") << dim;
  }
}

// What widening costs, where computing bounds decode; fewer bytes, where memory does.
TEST(Planner, CodesCostTheirWideningAndSaveTheirBytes) {
  const auto decode_us = [](Quantised format, int64_t len_k, double read_gbytes_per_s) {
    CpuFacts cpu = server();
    cpu.read_gbytes_per_s = read_gbytes_per_s;
    Problem p = eight_heads(2, 1, len_k, 128);
    p.quantised_k = p.quantised_v = format;
    const auto made = make_plan(p, {}, {cpu, kernels_of(Device::kCpu)});
    return candidate(*made, "cpu_decode").estimated_us;
  };
  constexpr double kFast = 1e6, kSlow = 5;
  for (const Quantised format : {Quantised::kInt8, Quantised::kQ8_0, Quantised::kQ4_0}) {
    const double us = decode_us(format, 4096, kFast);
    EXPECT_GT(us, decode_us(Quantised::kNone, 4096, kFast)) << kQuantiseds.name(format);
    EXPECT_LT(us, decode_us(Quantised::kE4m3, 4096, kFast)) << kQuantiseds.name(format);
    EXPECT_LT(decode_us(format, 1 << 20, kSlow), 0.65 * decode_us(Quantised::kNone, 1 << 20, kSlow))
        << kQuantiseds.name(format);
  }
}

// A server and a laptop, of shapes around the borders between kernels.
TEST(Planner, BatchInvarianceCoversTheChoiceOfTheKernel) {
  int differ_without = 0;
  for (const CpuFacts& cpu : {server(), laptop()}) {
    const Machine machine{cpu, kernels_of(Device::kCpu)};
    for (const int64_t len_q : {1, 2, 4, 8, 16, 64}) {
      for (const int64_t len_k : {64, 512, 4096, 32768}) {
        for (const int64_t heads_kv : {1, 2, 8}) {
          const auto kernel_of = [&](int64_t batch, bool batch_invariant) {
            Problem p = eight_heads(heads_kv, len_q, len_k, 128);
            p.batch = batch;
            Limits limits;
            limits.batch_invariant = batch_invariant;
            return make_plan(p, limits, machine)->kernel;
          };
          const std::string alone = kernel_of(1, true);
          for (const int64_t batch : {2, 16, 300}) {
            EXPECT_EQ(kernel_of(batch, true), alone) << len_q << " x " << len_k << ", " << batch;
            differ_without += kernel_of(batch, false) != alone;
          }
        }
      }
    }
  }
  EXPECT_GT(differ_without, 0) << "the option changes nothing here: the test tests nothing";
}

TEST(Planner, AMachineWithoutCudaSaysWhy) {
  CudaFacts cuda;
  cuda.unavailable = "no driver";
  Problem p = chunk(512);
  p.device = Device::kCuda;
  const auto made = make_plan(p, {}, {cuda, {}});
  ASSERT_FALSE(made.ok());
  EXPECT_EQ(made.status().code(), Code::kRefused);
  EXPECT_EQ(made.status().message(), "device cuda:0 cannot run: no driver");
}

TEST(PlanJson, RoundTrips) {
  Limits limits;
  limits.workspace_bytes = 512 << 20;
  limits.threads = 2;
  Problem p = chunk(32768);
  p.window_left = 100;
  p.softcap = 30.5f;
  const auto made = plan(p, limits);
  const auto again = plan_from_json(to_json(*made), this_machine);
  ASSERT_TRUE(again.ok()) << again.status().message();
  EXPECT_EQ(*again, *made);
}

struct BrokenJson {
  const char* from;
  const char* to;
  const char* message;
};

TEST(PlanJson, RefusesWhatWasEdited) {
  Limits limits;
  limits.threads = 2;
  const std::string json = to_json(*plan(chunk(512), limits));
  const BrokenJson edits[] = {
      {"\"heads_q\": 64", "\"heads_q\": 63", "multiple of heads_kv"},
      {"\"heads_q\": 64", "\"heads_q\": 1e3", "problem.heads_q is not an integer"},
      {"\"heads_q\": 64", "\"heads_q\": 99999999999999999999", "problem.heads_q"},
      {"\"causal\": \"bottom-right\"", "\"causal\": \"up\"", "valid: none, bottom-right, top-left"},
      {"\"len_q\": 2048,", "", "problem.len_q is missing"},
      {"\"tile_k\": ", "\"tile_k\": 1", "plan again"},
      {"\"kernel\": \"cpu_prefill\"", "\"kernel\": \"cpu_unfused\"", "plan again"},
      {"\"arithmetic\": \"f32\"", "\"arithmetic\": \"bf16\"", "plan again"},
      {"\"arithmetic\": \"f32\"", "\"arithmetic\": \"f8\"", "valid: f64, f32, 3xTF32, f16"},
      {"\"variant\": \"", "\"variant\": \"no ", "plan again"},
      {"\"threads\": 2,\n    \"workers\"", "\"threads\": 3,\n    \"workers\"",
       "config.threads is 3; 2 workers make it 2"},
      {"\"sinks\": false", "\"sinks\": 0", "problem.sinks is not true or false"},
  };
  for (const BrokenJson& edit : edits) {
    std::string text = json;
    const size_t at = text.find(edit.from);
    ASSERT_NE(at, std::string::npos) << edit.from;
    text.replace(at, std::string(edit.from).size(), edit.to);
    const auto read = plan_from_json(text, this_machine);
    ASSERT_FALSE(read.ok()) << edit.to;
    EXPECT_NE(read.status().message().find(edit.message), std::string::npos)
        << read.status().message();
  }
  EXPECT_EQ(plan_from_json("{", this_machine).status().message(), "the plan is not JSON");
  EXPECT_FALSE(plan_from_json("[]", this_machine).ok());
  EXPECT_FALSE(plan_from_json("{}", this_machine).ok());
}

TEST(Profile, CorrectsTheFormulaWhereItWasMeasured) {
  Profile profile({"a CPU", "AVX2", "", 2, "0.1.0"}, "2026-01-01");
  const CostFeatures here = CostFeatures::of(chunk(512)), there = CostFeatures::of(chunk(65536));
  profile.add("cpu_prefill", {here, 1.0f});
  profile.add("cpu_prefill", {there, -1.0f});
  EXPECT_NEAR(profile.correction("cpu_prefill", here), 2, 1e-3);
  EXPECT_NEAR(profile.correction("cpu_prefill", there), 0.5, 1e-3);
  const double between = profile.correction("cpu_prefill", CostFeatures::of(chunk(8192)));
  EXPECT_GT(between, 0.5);
  EXPECT_LT(between, 2);
  EXPECT_EQ(profile.correction("another", here), 1);
}

TEST(Profile, RoundTripsAndSaysWhatIsWrong) {
  Profile profile({"a CPU", "AVX2", "", 2, "0.1.0"}, "2026-01-01");
  profile.add("cpu_prefill", {CostFeatures::of(chunk(512)), 0.25f});
  profile.add("cpu_prefill", {CostFeatures::of(chunk(1024)), 1});
  profile.add("cpu_decode", {CostFeatures::of(chunk(1)), -2});
  // Not kept: the reader would refuse the whole.
  profile.add("cpu_decode", {CostFeatures::of(chunk(2)), 12.7f});
  profile.add("cpu_decode", {CostFeatures::of(chunk(2)), -INFINITY});
  EXPECT_TRUE(Profile::from_json(Profile().to_json()).ok());
  const auto again = Profile::from_json(profile.to_json());
  ASSERT_TRUE(again.ok()) << again.status().message();
  EXPECT_EQ(again->points(), profile.points());
  EXPECT_EQ(difference(again->identity(), profile.identity()), "");
  EXPECT_EQ(difference({"a CPU", "AVX2", "", 8, "0.1.0"}, profile.identity()),
            "threads: 8 then, 2 now");
  EXPECT_EQ(Profile::from_json("x").status().message(), "the profile is not JSON");
  EXPECT_NE(Profile::from_json("{\"format\": 9}").status().message().find("format is 9"),
            std::string::npos);
  std::string wild = profile.to_json();
  wild.replace(wild.find("0.25"), 4, "1e30");
  EXPECT_NE(Profile::from_json(wild).status().message().find("ratio_log2"), std::string::npos);
}

TEST(Profile, IsUsedByThePlannerForEveryCoreOnly) {
  Machine machine = this_machine(Device::kCpu, 0);
  machine.profile = nullptr;
  const Plan formula = *make_plan(chunk(512), {}, machine);
  Profile profile;
  profile.add("cpu_prefill", {CostFeatures::of(chunk(512)), 9.0f});
  profile.add("cpu_unfused", {CostFeatures::of(chunk(512)), 0.0f});
  machine.profile = &profile;
  EXPECT_EQ(make_plan(chunk(512), {}, machine)->kernel, "cpu_unfused");
  Limits one_more;
  one_more.threads = machine.facts.cores + 1;
  EXPECT_EQ(make_plan(chunk(512), one_more, machine)->kernel, formula.kernel);
}

TEST(Environment, OverridesLimitsAndNamesWhatIsWrong) {
  Limits limits;
  ASSERT_TRUE(apply({"cpu_unfused", "1024", "1GiB", "plan"}, Problem{}, limits).ok());
  EXPECT_EQ(limits.kernel, "cpu_unfused");
  EXPECT_EQ(limits.policy, Policy::kFusedAbove);
  EXPECT_EQ(limits.fused_above, 1024);
  EXPECT_EQ(limits.workspace_bytes, uint64_t{1} << 30);
  // A threshold wins over a kernel that the program forces, and a kernel of the environment's over
  // both; one of the other device's does not concern this one.
  Limits forced;
  forced.kernel = "cpu_unfused";
  ASSERT_TRUE(apply({"", "0", "", ""}, Problem{}, forced).ok());
  EXPECT_EQ(forced.kernel, "");
  EXPECT_EQ(make_plan(chunk(512), forced, this_machine(Device::kCpu, 0))->kernel, "cpu_prefill");
  EXPECT_EQ(variables_for({"cpu_unfused", "", "1GiB", "plan"}, Problem{}).size(), 2u);
  EXPECT_EQ(
      variables_for({"cpu_unfused", "", "1GiB", "plan"}, Problem{.device = Device::kCuda}).size(),
      1u);
  const auto message = [](const Environment& environment) {
    Limits unused;
    return apply(environment, Problem{}, unused).message();
  };
  EXPECT_NE(message({"cpu_unfusd", "", "", ""}).find("did you mean \"cpu_unfused\""),
            std::string::npos);
  EXPECT_NE(message({"", "many", "", ""}).find("WIDEHEAD_FUSED_ABOVE is \"many\""),
            std::string::npos);
  EXPECT_NE(message({"", "", "lots", ""}).find("WIDEHEAD_WORKSPACE_LIMIT is \"lots\""),
            std::string::npos);
  EXPECT_NE(message({"", "", "", "all"}).find("WIDEHEAD_LOG is \"all\""), std::string::npos);
}

TEST(Work, CountsVisiblePairsAsTheDefinitionDoes) {
  for (const int64_t len_q : {1, 5, 17}) {
    for (const int64_t len_k : {1, 6, 20}) {
      for (const Causal causal : {Causal::kNone, Causal::kBottomRight, Causal::kTopLeft}) {
        for (const int64_t left : {-1, 0, 3}) {
          for (const int64_t right : {-1, 0, 2}) {
            Problem p = chunk(len_k);
            p.len_q = len_q;
            p.causal = causal;
            p.window_left = left;
            p.window_right = right;
            int64_t pairs = 0, most = 0, first = len_k, last = 0;
            for (int64_t i = 0; i < len_q; ++i) {
              const KeyRange keys = visible_keys(p, {0, len_k}, i);
              pairs += keys.size();
              if (keys.empty()) continue;
              first = std::min(first, keys.begin);
              last = std::max(last, keys.end);
            }
            most = std::max<int64_t>(0, last - first);
            EXPECT_EQ(visible_pairs(p), static_cast<double>(pairs)) << describe(p);
            EXPECT_GE(most_visible_keys(p), most) << describe(p);
          }
        }
      }
    }
  }
}

CostPoint cost(float rows, float keys, float log2_ratio) {
  return {{rows, keys, 8, 3, 0, Dtype::kF16}, log2_ratio};
}

TEST(Profile, CorrectsWhereItWasMeasuredAndFadesFarAway) {
  Profile profile({"a CPU", "AVX2", "", 2, "1"}, "2026-01-31");
  for (const float keys : {4.0f, 6.0f, 8.0f}) profile.add("slow", cost(4, keys, 2));
  const auto at = [&](float rows, float keys) {
    return profile.correction("slow", cost(rows, keys, 0).at);
  };
  EXPECT_NEAR(at(4, 6), 4, 0.01);
  EXPECT_NEAR(at(5, 7), 4, 0.1);
  EXPECT_NEAR(at(13, 18), 1, 0.25);  // 8192 rows, 262,144 keys
  EXPECT_EQ(profile.correction("another", cost(4, 6, 0).at), 1);
}

// Those that ship name kernels that exist, and hold what they are chosen by.
TEST(Profile, ShippedOnesHoldCostsOfTheirKernels) {
  EXPECT_FALSE(shipped_profiles().empty());
  for (const ShippedProfile& one : shipped_profiles()) {
    const Result<Profile> profile = Profile::from_json(one.json);
    ASSERT_TRUE(profile.ok()) << one.device << ": " << profile.status().message();
    EXPECT_EQ(profile->identity().isa, one.isa);
    EXPECT_EQ(profile->identity().device, one.device);
    const Device device = std::string(one.isa).starts_with("sm_") ? Device::kCuda : Device::kCpu;
    if (kernels_of(device).empty()) continue;  // a build without CUDA
    EXPECT_FALSE(profile->points().empty()) << one.device;
    for (const auto& [kernel, points] : profile->points()) {
      EXPECT_NE(find_kernel(kernels_of(device), kernel), nullptr) << one.device << ": " << kernel;
      EXPECT_FALSE(points.empty()) << one.device << ": " << kernel;
    }
  }
}

std::string shipped_for(const char* isa, const char* device) {
  const ShippedProfile* one = closest_profile(shipped_profiles(), {device, isa, "", 0, ""});
  return one == nullptr ? "none" : one->device;
}

TEST(Profile, TheCardChoosesAmongThoseOfItsInstructionSet) {
  EXPECT_EQ(shipped_for("sm_90", "NVIDIA H200"), "NVIDIA H200");
  EXPECT_EQ(shipped_for("sm_90", "NVIDIA H200 NVL"), "NVIDIA H200");
  EXPECT_EQ(shipped_for("sm_90", "NVIDIA H100 80GB HBM3"), "NVIDIA H100 80GB HBM3");
  EXPECT_EQ(shipped_for("sm_90", "NVIDIA H100 PCIe"), "NVIDIA H100 80GB HBM3");
  EXPECT_EQ(shipped_for("sm_90", "NVIDIA GH200 480GB"), "NVIDIA H100 80GB HBM3");
  EXPECT_EQ(shipped_for("sm_90", ""), "NVIDIA H100 80GB HBM3");
  EXPECT_EQ(shipped_for("AVX3", "Intel Xeon, family 6"), "AMD EPYC, family 25");
  EXPECT_EQ(shipped_for("AVX3", "AMD EPYC, family 25"), "AMD EPYC, family 25");
  EXPECT_EQ(shipped_for("AVX3", "AMD EPYC, family 26"), "AMD EPYC, family 26");
  EXPECT_EQ(shipped_for("AVX2", "Intel Xeon, family 6"), "AMD EPYC, family 25");
  EXPECT_EQ(shipped_for("sm_80", "NVIDIA H200"), "none");
}

TEST(ByteSize, ReadsWhatPeopleWrite) {
  EXPECT_EQ(parse_bytes("4096"), 4096u);
  EXPECT_EQ(parse_bytes("512MiB"), uint64_t{512} << 20);
  EXPECT_EQ(parse_bytes("1.5 GiB"), uint64_t{3} << 29);
  EXPECT_EQ(parse_bytes("8GB"), 8000000000u);
  for (const char* wrong : {"", "MiB", "-1", "1.2.3", "5 bananas", "1e9999", "99999999TiB"}) {
    EXPECT_FALSE(parse_bytes(wrong)) << wrong;
  }
}

TEST(NearestName, FindsTheSmallestEdit) {
  EXPECT_EQ(nearest_name("gema-3-4b", {"gemma-2-9b", "gemma-3-4b", "llama"}), "gemma-3-4b");
  EXPECT_EQ(nearest_name("x", {}), "");
}

}  // namespace
}  // namespace wh
