// Attention on dense tensors through the C ABI, held as f32 whatever type the kernel takes, for
// tests of relations between runs. Kernels and the memory they read are the test program's: see
// kernels_under_test.h.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "support/kernels_under_test.h"
#include "support/makers.h"
#include "verify/elements.h"
#include "widehead/widehead.h"

namespace wh {

inline size_t element_bytes(int32_t dtype) { return dtype == WH_F32 ? 4 : 2; }

// To nearest even, as elements of a WH_F32, WH_F16 or WH_BF16.
inline std::vector<std::byte> elements_of(const std::vector<float>& from, int32_t dtype) {
  std::vector<std::byte> to(from.size() * element_bytes(dtype));
  for (size_t i = 0; i < from.size(); ++i) {
    put(to.data(), static_cast<Dtype>(dtype), static_cast<int64_t>(i), from[i]);
  }
  return to;
}

inline std::vector<float> floats_of(const std::vector<std::byte>& from, int32_t dtype) {
  std::vector<float> to(from.size() / element_bytes(dtype));
  for (size_t i = 0; i < to.size(); ++i) {
    to[i] = load_element(from.data(), static_cast<Dtype>(dtype), static_cast<int64_t>(i));
  }
  return to;
}

struct Attention {
  wh_problem problem;
  wh_limits limits = no_limits();
  std::vector<float> q, k, v, out, lse;  // the last two hold NaN until a run writes them
  std::vector<float> mask;               // [len_q, len_k], additive; of q's type, or f32
  std::vector<float> sinks;              // [heads_q]
  std::vector<int32_t> key_lengths;
  int32_t dtype = WH_F32;  // where the kernel takes it: see dtypes_of()
  PlanHandle plan;         // of the last run

  Attention(int64_t heads_q, int64_t heads_kv, int64_t len_q, int64_t len_k, int64_t dim,
            int64_t batch = 1)
      : problem(problem_of(batch, heads_q, heads_kv, len_q, len_k, dim)) {
    std::mt19937 random(7);
    q = normal_values(batch * heads_q * len_q * dim, random);
    k = normal_values(batch * heads_kv * len_k * dim, random);
    v = normal_values(batch * heads_kv * len_k * dim, random);
  }

  void run(const std::string& kernel, const wh_executor* executor = nullptr) {
    wh_run_options options;
    ASSERT_EQ(wh_run_options_init(&options, sizeof(options)), WH_OK);
    options.executor = executor;
    ASSERT_EQ(run_with(kernel, options), WH_OK) << wh_last_error();
  }

  // What is wrong, wh_last_error() says.
  wh_status run_with(const std::string& kernel, const wh_run_options& options) {
    constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
    wh_problem& p = problem;
    p.device = device_of(kernel);
    if (!takes(kernel, dtype)) dtype = WH_BF16;
    p.dtype_q = p.dtype_kv = dtype;
    if (!mask.empty()) {
      if (p.mask == WH_MASK_NONE) p.mask = WH_MASK_ADDITIVE;
      p.stride_mask[0] = p.stride_mask[1] = 0;
      p.stride_mask[2] = p.len_k;
      p.stride_mask[3] = 1;
    }
    p.uses = WH_USES_LOG_SUM_EXP | (key_lengths.empty() ? 0 : WH_USES_KEY_LENGTHS) |
             (sinks.empty() ? 0 : WH_USES_SINKS);
    const wh_status planned = make_plan(p, limits, kernel, plan);
    if (planned != WH_OK) return planned;
    const uint64_t workspace_bytes = wh_plan_workspace_bytes(plan.get());

    out.assign(static_cast<size_t>(p.batch * p.heads_q * p.len_q * p.dim_v), kNan);
    lse.assign(static_cast<size_t>(p.batch * p.heads_q * p.len_q), kNan);
    const auto bytes = [](const auto& values) {
      const auto* from = reinterpret_cast<const std::byte*>(values.data());
      return std::vector<std::byte>(from, from + values.size() * sizeof(values[0]));
    };
    const Placed at_q(elements_of(q, dtype)), at_k(elements_of(k, dtype)),
        at_v(elements_of(v, dtype)), at_out(elements_of(out, dtype)), at_lse(bytes(lse)),
        at_mask(elements_of(mask, p.mask == WH_MASK_ADDITIVE ? dtype : WH_F32)),
        at_sinks(bytes(sinks)), at_lengths(bytes(key_lengths)), workspace(workspace_bytes);
    wh_tensors t;
    EXPECT_EQ(wh_tensors_init(&t, sizeof(t)), WH_OK);
    t.q = at_q.data();
    t.k = at_k.data();
    t.v = at_v.data();
    t.out = at_out.data();
    t.mask = at_mask.data();
    t.sinks = static_cast<const float*>(at_sinks.data());
    t.key_lengths = static_cast<const int32_t*>(at_lengths.data());
    t.log_sum_exp = static_cast<float*>(at_lse.data());
    t.workspace = workspace.data();
    t.workspace_bytes = workspace_bytes;
    const wh_status status = wh_plan_run(plan.get(), &t, &options);
    out = floats_of(at_out.fetch(), dtype);
    lse = floats_of(at_lse.fetch(), WH_F32);
    return status;
  }
};

inline void expect_near(const std::vector<float>& have, const std::vector<float>& want,
                        float bound) {
  ASSERT_EQ(have.size(), want.size());
  for (size_t i = 0; i < have.size(); ++i) ASSERT_NEAR(have[i], want[i], bound) << "element " << i;
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * 4) == 0;
}

}  // namespace wh
