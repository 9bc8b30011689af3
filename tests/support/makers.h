// What tests that call the C ABI make their calls from.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "widehead/widehead.h"

namespace wh {

struct DestroyPlan {
  void operator()(wh_plan* plan) const { wh_plan_destroy(plan); }
};
using PlanHandle = std::unique_ptr<wh_plan, DestroyPlan>;

// Dense tensors of dim_qk = dim_v = dim.
inline wh_problem problem_of(int64_t batch, int64_t heads_q, int64_t heads_kv, int64_t len_q,
                             int64_t len_k, int64_t dim) {
  wh_problem p;
  EXPECT_EQ(wh_problem_init(&p, sizeof(p)), WH_OK);
  p.batch = batch;
  p.heads_q = heads_q;
  p.heads_kv = heads_kv;
  p.len_q = len_q;
  p.len_k = len_k;
  p.dim_qk = p.dim_v = dim;
  EXPECT_EQ(wh_problem_set_dense(&p), WH_OK);
  return p;
}

inline wh_limits no_limits() {
  wh_limits limits;
  EXPECT_EQ(wh_limits_init(&limits, sizeof(limits)), WH_OK);
  return limits;
}

// A plan with this kernel alone; what is wrong, wh_last_error() says.
inline wh_status make_plan(const wh_problem& problem, wh_limits limits, const std::string& kernel,
                           PlanHandle& plan) {
  limits.kernel = kernel.c_str();
  wh_plan* made = nullptr;
  const wh_status status = wh_plan_create(&problem, &limits, &made);
  plan.reset(made);
  return status;
}

inline std::vector<float> normal_values(int64_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

}  // namespace wh
