// The planner's choices for cards against what every kernel took there: the recorded runs in
// bench/results. No GPU is needed: the formulas take the card's facts.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <regex>

#include "api/machine.h"
#include "api/profile_store.h"
#include "core/names.h"
#include "cuda/cuda_facts.h"
#include "cuda/registry.h"
#include "plan/planner.h"
#include "support/cards.h"

namespace wh {
namespace {

using Json = nlohmann::json;

struct Measured {
  std::string name;
  Problem problem;
  std::map<std::string, double> us;  // by kernel
};

Measured measured(const Json& row, const std::string& name) {
  Measured one{name, {}, {}};
  Problem& p = one.problem;
  p.device = Device::kCuda;
  p.batch = row["batch"];
  p.heads_q = row["heads_q"];
  p.heads_kv = row["heads_kv"];
  p.len_q = row["len_q"];
  p.len_k = row["len_k"];
  p.dim_qk = row["dim_qk"];
  p.dim_v = row["dim_v"];
  p.causal = row["causal"].get<bool>() ? Causal::kBottomRight : Causal::kNone;
  p.dtype_q = row["dtype"] == "f32"   ? Dtype::kF32
              : row["dtype"] == "f16" ? Dtype::kF16
                                      : Dtype::kBf16;
  p.dtype_kv = p.dtype_q;
  p.values_in_keys = row.value("values_in_keys", false);
  set_dense(p);
  return one;
}

// The one that describe() calls so.
Problem described(const std::string& text) {
  Problem p;
  p.device = Device::kCuda;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(", ", begin), text.size());
    const std::string words = text.substr(begin, end - begin);
    begin = end + 2;
    long a = 0, b = 0;
    const auto numbers = [&](const char* form) { return std::sscanf(words.c_str(), form, &a, &b); };
    if (words == "causal") {
      p.causal = Causal::kBottomRight;
    } else if (words == "key lengths") {
      p.has_key_lengths = true;
    } else if (numbers("batch %ld") == 1) {
      p.batch = a;
    } else if (numbers("%ld/%ld heads") == 2) {
      p.heads_q = a, p.heads_kv = b;
    } else if (const int dims = numbers("dim %ld/%ld"); dims > 0) {
      p.dim_qk = a, p.dim_v = dims == 2 ? b : a;
    } else if (numbers("%ld x %ld") == 2) {
      p.len_q = a, p.len_k = b;
    } else if (numbers("%ld pages of %ld") == 2) {
      p.key_layout = KeyLayout::kPaged;
      p.pages = a, p.page_size = b;
    } else {
      const std::string over = " over ";
      const size_t dtype_end = words.find(over), colon = words.find(':');
      p.dtype_q = p.dtype_kv = kDtypes.value(words.substr(0, dtype_end)).value();
      if (dtype_end == std::string::npos) continue;
      const size_t format = dtype_end + over.size();
      p.quantised_k = kQuantiseds.value(words.substr(format, colon - format)).value();
      p.scales_k = kScales.value(words.substr(colon + 1)).value();
      p.quantised_v = p.quantised_k;
      p.scales_v = p.scales_k;
    }
  }
  set_dense(p);
  EXPECT_EQ(describe(p), text);
  return p;
}

struct Recorded {
  CudaFacts facts;
  std::string results;  // what their names in bench/results begin with
};
const Recorded kH100{h100(), "nvidia-h100-80gb-hbm3-2026-11-26"};
const Recorded kH200{h200(), "nvidia-h200-2026-11-29"};

Json read(const std::string& file) {
  std::ifstream stream(std::string(WIDEHEAD_RESULTS) + "/" + file);
  return Json::parse(stream);
}

// bench/gpu.py: launches in CUDA graphs or between events.
std::vector<Measured> kernel_rows(const Recorded& on) {
  std::vector<Measured> all;
  const Json document = read(on.results + "-kernels.json");
  for (const char* group : {"prefill", "decode", "portable"}) {
    for (const Json& row : document[group]) {
      Measured one = measured(row, row["name"]);
      // Recorded before few rows of f32 ran on the CUDA cores.
      const Problem& p = one.problem;
      if (p.dtype_q == Dtype::kF32 && p.len_q * p.group() <= 8) continue;
      for (const auto& [name, result] : row["results"].items()) {
        if (name.starts_with("torch")) continue;
        one.us[name == "widehead" ? row["kernel"].get<std::string>() : name] = result["median_us"];
      }
      all.push_back(std::move(one));
    }
  }
  return all;
}

// Rows of the command line's JSON, what each kernel took beside its problem.
std::vector<Measured> described_rows(const Json& document) {
  std::map<std::string, Measured> all;
  for (const Json& row : document["rows"]) {
    if (row.contains("refused")) continue;
    const std::string name = row["problem"];
    if (!all.contains(name)) all.emplace(name, Measured{name, described(name), {}});
    all.at(name).us[row["kernel"]] = row["best_us"];
  }
  std::vector<Measured> rows;
  for (auto& [name, one] : all) rows.push_back(std::move(one));
  return rows;
}

// widehead bench routing --device cuda: replayed graphs.
std::vector<Measured> call_rows(const Recorded& on) {
  return described_rows(read(on.results + "/routing.json"));
}

// bench/gpu_serving.py: one query a sequence over dense, packed and paged keys, and what the kernel
// took that the planner chose then.
std::vector<Measured> serving_rows() {
  const std::regex words(R"(decode d?(\d+)(?:/(\d+))? (\d+)/(\d+), (\d+) x (\d+)(?:, V in K)?|)"
                         R"((\d+) sequences of \d+ to (\d+) keys, d(\d+) (\d+)/(\d+))");
  // The last run of a kernel counts.
  std::map<std::string, Measured> all;
  Json runs = Json::array();
  for (const char* run : {"page-boxes", "rivals", "both-kernels"}) {
    const Json document = read(kH200.results + "-serving-" + run + ".json");
    for (const Json& row : document["rows"]) runs.push_back(row);
  }
  for (const Json& row : runs) {
    const std::string name = row["name"];
    std::smatch found;
    if (!std::regex_match(name, found, words)) continue;
    const auto number = [&](int of_equal, int of_ragged) {
      return std::stoll(found[static_cast<size_t>(found[1].matched ? of_equal : of_ragged)]);
    };
    const bool has_values_in_keys = found[2].matched;
    Json fields{{"batch", number(5, 7)},
                {"heads_q", number(3, 10)},
                {"heads_kv", number(4, 11)},
                {"dim_qk", number(1, 9)},
                {"dim_v", has_values_in_keys ? number(2, 2) : number(1, 9)},
                {"len_q", 1},
                {"len_k", number(6, 8)},
                {"dtype", "bf16"},
                {"causal", true},
                {"values_in_keys", has_values_in_keys}};
    for (const auto& [layout, result] : row["layouts"].items()) {
      // The build before, and other libraries.
      if (layout.ends_with("beside") || result.contains("beside")) continue;
      const std::string kernel = result["kernel"];
      if (const auto seen = all.find(name + ", " + layout); seen != all.end()) {
        seen->second.us[kernel] = result["us"];
        continue;
      }
      Measured one = measured(fields, name + ", " + layout);
      one.us[kernel] = result["us"];
      Problem& p = one.problem;
      p.has_key_lengths = true;
      const int64_t width = p.dim_qk + (p.values_in_keys ? 0 : p.dim_v);
      const int64_t keys = row["kv_bytes"].get<int64_t>() / (2 * p.heads_kv * width);
      if (layout != "dense") {
        p.query_layout = QueryLayout::kPacked;
        p.total_q = p.batch;
      }
      if (layout == "packed") {
        p.key_layout = KeyLayout::kPacked;
        p.total_k = keys;
      } else if (layout != "dense") {
        p.key_layout = KeyLayout::kPaged;
        p.page_size = std::stoll(layout.substr(std::string("pages of ").size()));
        p.pages = keys / p.page_size + p.batch;
        p.stride_page_table = p.pages_a_sequence();
      }
      set_dense(p);
      all.emplace(name + ", " + layout, std::move(one));
    }
  }
  std::vector<Measured> rows;
  for (auto& [name, one] : all) rows.push_back(std::move(one));
  return rows;
}

struct Choices {
  std::vector<double> regrets, errors;  // sorted
};

Choices choices(const CudaFacts& facts, const std::vector<Measured>& rows, const Profile* profile) {
  Choices result;
  for (const Measured& row : rows) {
    const auto plan = make_plan(row.problem, {}, {facts, cuda::kernels(), profile});
    if (!plan.ok() || !row.us.contains(plan->kernel)) {
      ADD_FAILURE() << row.name << ": " << (plan.ok() ? plan->kernel : plan.status().message());
      continue;
    }
    // Without cuBLASLt the rest is what can be compared.
    double best = INFINITY;
    for (const Candidate& candidate : plan->candidates) {
      const auto us = row.us.find(candidate.kernel);
      if (candidate.verdict != Verdict::kRefused && us != row.us.end()) {
        best = std::min(best, us->second);
      }
    }
    const double took = row.us.at(plan->kernel);
    result.regrets.push_back(took / best);
    result.errors.push_back(std::fabs(plan->estimated_us / took - 1));
    std::printf("%-48s %-18s estimate %9.1f us, took %9.1f, regret %.2f\n", row.name.c_str(),
                plan->kernel.c_str(), plan->estimated_us, took, result.regrets.back());
  }
  std::sort(result.regrets.begin(), result.regrets.end());
  std::sort(result.errors.begin(), result.errors.end());
  return result;
}

double middle(const std::vector<double>& sorted) { return sorted[sorted.size() / 2]; }

void expect_goals(const Choices& made, double worst_regret, double worst_error) {
  EXPECT_LE(middle(made.regrets), 1.01);
  EXPECT_LE(made.regrets.back(), worst_regret);
  EXPECT_LE(middle(made.errors), 0.15);
  EXPECT_LE(made.errors.back(), worst_error);
}

// The card's own.
Profile shipped_profile(const CudaFacts& facts) {
  const ShippedProfile* shipped =
      closest_profile(shipped_profiles(), {facts.name, "sm_90", "", facts.sms, ""});
  if (shipped == nullptr || shipped->device != facts.name) {
    ADD_FAILURE() << "no profile of " << facts.name;
    return {};
  }
  const Result<Profile> profile = Profile::from_json(shipped->json);
  EXPECT_TRUE(profile.ok()) << profile.status().message();
  return profile.ok() ? *profile : Profile();
}

class CudaRouting : public testing::TestWithParam<Recorded> {};
INSTANTIATE_TEST_SUITE_P(Cards, CudaRouting, testing::Values(kH100, kH200));

TEST_P(CudaRouting, FormulasChooseTheFastestKernelOfTheRecordedSuites) {
  expect_goals(choices(GetParam().facts, kernel_rows(GetParam()), nullptr), 1.10, 0.40);
}

TEST_P(CudaRouting, TheShippedProfileChoosesTheFastestKernelOfTheRecordedCalls) {
  const CudaFacts& facts = GetParam().facts;
  const Profile profile = shipped_profile(facts);
  const Choices made = choices(facts, call_rows(GetParam()), &profile);
  EXPECT_GE(made.regrets.size(), 60u);
  expect_goals(made, 1.10, 0.40);
}

// Every estimate is within `tolerance(candidate, plan)` of what its kernel took, and the plan takes
// the fastest kernel. The errors, sorted.
template <typename Tolerance>
std::vector<double> expect_near(const CudaFacts& facts, const std::vector<Measured>& rows,
                                Tolerance tolerance) {
  const Profile profile = shipped_profile(facts);
  std::vector<double> errors;
  for (const Measured& row : rows) {
    const auto plan = make_plan(row.problem, {}, {facts, cuda::kernels(), &profile});
    if (!plan.ok() || !row.us.contains(plan->kernel)) {
      ADD_FAILURE() << row.name << ": " << (plan.ok() ? plan->kernel : plan.status().message());
      continue;
    }
    double least_us = std::numeric_limits<double>::infinity();
    for (const auto& [kernel, us] : row.us) least_us = std::min(least_us, us);
    EXPECT_EQ(row.us.at(plan->kernel), least_us) << row.name << ": " << plan->kernel;
    for (const Candidate& candidate : plan->candidates) {
      if (!row.us.contains(candidate.kernel)) continue;
      const double ratio = candidate.estimated_us / row.us.at(candidate.kernel);
      EXPECT_NEAR(ratio, 1, tolerance(candidate, *plan)) << row.name << ", " << candidate.kernel;
      errors.push_back(std::fabs(ratio - 1));
    }
  }
  std::sort(errors.begin(), errors.end());
  return errors;
}

TEST(CudaServing, TheShippedProfileEstimatesTheRecordedLayouts) {
  const auto errors =
      expect_near(kH200.facts, serving_rows(), [](const Candidate& candidate, const Plan& plan) {
        return candidate.kernel == plan.kernel ? 0.20 : 0.25;
      });
  EXPECT_EQ(errors.size(), 41u);
}

TEST(CudaCodes, TheShippedProfileEstimatesTheRecordedRows) {
  std::vector<Measured> rows;
  for (const char* of : {"30-decode", "30-prefill", "30-prefill-wide"}) {
    for (Measured& row :
         described_rows(read(fmt::format("nvidia-h200-2026-11-{}-codes.json", of)))) {
      // What bf16 took beside them is not of every kernel.
      if (is_quantised(row.problem)) rows.push_back(std::move(row));
    }
  }
  const auto errors = expect_near(kH200.facts, rows, [](const Candidate& candidate, const Plan&) {
    return candidate.kernel == "cuda_portable" ? 0.40 : 0.20;
  });
  EXPECT_EQ(errors.size(), 78u);
  EXPECT_LE(middle(errors), 0.10);
}

TEST_P(CudaRouting, BatchInvarianceCoversTheChoiceOfTheKernel) {
  const CudaFacts& facts = GetParam().facts;
  Limits limits;
  limits.batch_invariant = true;
  for (const Measured& row : kernel_rows(GetParam())) {
    std::string alone;
    for (const int64_t batch : {1, 2, 16, 300}) {
      Problem p = row.problem;
      p.batch = batch;
      const auto plan = make_plan(p, limits, {facts, cuda::kernels()});
      ASSERT_TRUE(plan.ok()) << plan.status().message();
      if (batch == 1) alone = plan->kernel;
      EXPECT_EQ(plan->kernel, alone) << row.name << ", batch " << batch;
    }
  }
}

}  // namespace
}  // namespace wh
