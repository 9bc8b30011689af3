// A small valid call of the C ABI with its tensors, to be spoiled in one place.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "widehead/widehead.h"

namespace wh {

struct Call {
  wh_problem problem;
  wh_limits limits;
  wh_tensors tensors;
  wh_run_options options;
  std::vector<float> q = std::vector<float>(2 * 3 * 8, 1.0f);
  std::vector<float> k = std::vector<float>(5 * 8, 1.0f);
  std::vector<float> v = std::vector<float>(5 * 8, 2.0f);
  std::vector<float> out = std::vector<float>(2 * 3 * 8, std::numeric_limits<float>::quiet_NaN());
  std::vector<int32_t> lengths{5}, starts{0};

  Call() {
    EXPECT_EQ(wh_problem_init(&problem, sizeof(problem)), WH_OK);
    EXPECT_EQ(wh_limits_init(&limits, sizeof(limits)), WH_OK);
    EXPECT_EQ(wh_tensors_init(&tensors, sizeof(tensors)), WH_OK);
    EXPECT_EQ(wh_run_options_init(&options, sizeof(options)), WH_OK);
    problem.heads_q = 2;
    problem.len_q = 3;
    problem.len_k = 5;
    problem.dim_qk = problem.dim_v = 8;
    EXPECT_EQ(wh_problem_set_dense(&problem), WH_OK);
    tensors.q = q.data();
    tensors.k = k.data();
    tensors.v = v.data();
    tensors.out = out.data();
  }
  wh_status run() { return wh_attention(&problem, &limits, &tensors, &options); }
  bool out_is_untouched() const {
    for (const float value : out) {
      if (!std::isnan(value)) return false;
    }
    return true;
  }
};

}  // namespace wh
