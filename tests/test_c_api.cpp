// The C ABI as a caller meets it: defaults, plans, runs. Bad input is in test_bad_calls.cpp.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "support/call.h"

namespace wh {
namespace {

TEST(CApi, OneCallWorks) {
  Call call;
  ASSERT_EQ(call.run(), WH_OK) << wh_last_error();
  for (const float value : call.out) EXPECT_FLOAT_EQ(value, 2.0f);
  EXPECT_STREQ(wh_version(), "0.1.0");
}

// What is never stepped over is ignored, negative numbers and what would overflow too, and makes no
// difference to what is planned.
TEST(CApi, StridesOfADimensionOfOneMayBeAnything) {
  constexpr int64_t kAnything[] = {-1, -64, 3, std::numeric_limits<int64_t>::min(),
                                   std::numeric_limits<int64_t>::max()};
  Call dense;
  wh_plan* plan = nullptr;
  ASSERT_EQ(wh_plan_create(&dense.problem, nullptr, &plan), WH_OK) << wh_last_error();
  const std::string json = wh_plan_json(plan);
  wh_plan_destroy(plan);
  for (const int64_t stride : kAnything) {
    Call call;
    wh_problem& p = call.problem;  // batch and heads_kv are 1
    p.stride_q[0] = p.stride_k[0] = p.stride_k[1] = p.stride_v[0] = p.stride_v[1] = stride;
    p.stride_out[0] = stride;
    ASSERT_EQ(call.run(), WH_OK) << wh_last_error();
    for (const float value : call.out) EXPECT_FLOAT_EQ(value, 2.0f);
    ASSERT_EQ(wh_plan_create(&p, nullptr, &plan), WH_OK) << wh_last_error();
    EXPECT_EQ(wh_plan_json(plan), json);
    wh_plan_destroy(plan);
  }
}

TEST(CApi, StridesOfOneRowOfOneElementMayBeAnything) {
  Call call;
  wh_problem& p = call.problem;
  p.heads_q = p.len_q = p.len_k = p.dim_qk = p.dim_v = 1;
  p.mask = WH_MASK_BOOLEAN;
  for (int64_t* strides : {p.stride_q, p.stride_k, p.stride_v, p.stride_out, p.stride_mask}) {
    for (int i = 0; i < 4; ++i) strides[i] = -1000 * i - 1;
  }
  const uint8_t attend = 1;
  call.tensors.mask = &attend;
  ASSERT_EQ(call.run(), WH_OK) << wh_last_error();
  EXPECT_FLOAT_EQ(call.out[0], 2.0f);
  EXPECT_TRUE(std::isnan(call.out[1]));
}

// V in K: v has one column, whose stride nobody takes a step by, and k has eight.
TEST(CApi, AnUnsteppedStrideOfVInKNeedNotBeThatOfK) {
  Call call;
  wh_problem& p = call.problem;
  p.uses = WH_USES_VALUES_IN_KEYS;
  p.dim_v = 1;
  ASSERT_EQ(wh_problem_set_dense(&p), WH_OK);
  p.stride_v[0] = -8;
  p.stride_v[3] = 77;
  call.tensors.v = nullptr;
  ASSERT_EQ(call.run(), WH_OK) << wh_last_error();
  for (int i = 0; i < 6; ++i) EXPECT_FLOAT_EQ(call.out[i], 1.0f);
}

// A stored plan is what its problem was, every field of it.
TEST(CApi, APlanGivesItsProblemBack) {
  for (const uint32_t bit : {0, 1, 2, 4, 8, 16}) {
    Call call;
    wh_problem& p = call.problem;
    p.uses = bit;
    p.dtype_q = p.dtype_kv = WH_BF16;
    p.batch = 2;
    p.causal = WH_CAUSAL_TOP_LEFT;
    p.window_left = 3;
    p.window_right = 1;
    p.softcap = 5;
    p.mask = WH_MASK_BOOLEAN;
    ASSERT_EQ(wh_problem_set_dense(&p), WH_OK) << wh_last_error();
    wh_plan *plan = nullptr, *again = nullptr;
    ASSERT_EQ(wh_plan_create(&p, nullptr, &plan), WH_OK) << wh_last_error();
    const std::string json = wh_plan_json(plan);
    ASSERT_EQ(wh_plan_from_json(json.data(), json.size(), &again), WH_OK) << wh_last_error();
    for (const wh_plan* either : {plan, again}) {
      wh_problem back;
      ASSERT_EQ(wh_problem_init(&back, sizeof(back)), WH_OK);
      ASSERT_EQ(wh_plan_problem(either, &back), WH_OK) << wh_last_error();
      EXPECT_EQ(std::memcmp(&back, &p, offsetof(wh_problem, uses) + sizeof(p.uses)), 0)
          << "uses " << bit;
    }
    wh_plan_destroy(plan);
    wh_plan_destroy(again);
  }
}

// K holds V in its first columns: the same answer as from a copy of those, by every kernel.
TEST(CApi, ValuesMayLieInKeys) {
  for (size_t i = 0; wh_kernel_name(WH_CPU, i) != nullptr; ++i) {
    Call own, shared;
    own.problem.dim_v = shared.problem.dim_v = 3;
    shared.problem.uses = WH_USES_VALUES_IN_KEYS;
    own.limits.kernel = shared.limits.kernel = wh_kernel_name(WH_CPU, i);
    for (Call* call : {&own, &shared}) {
      ASSERT_EQ(wh_problem_set_dense(&call->problem), WH_OK);
      for (size_t j = 0; j < call->k.size(); ++j) call->k[j] = static_cast<float>(j % 7);
    }
    for (size_t j = 0; j < 5 * 3; ++j) own.v[j] = own.k[j / 3 * 8 + j % 3];
    shared.tensors.v = nullptr;
    const wh_status status = own.run();
    ASSERT_EQ(shared.run(), status);
    if (status == WH_REFUSED) continue;
    ASSERT_EQ(status, WH_OK) << wh_last_error();
    EXPECT_EQ(std::vector(own.out.begin(), own.out.begin() + 18),
              std::vector(shared.out.begin(), shared.out.begin() + 18));
    // Saying so twice is fine, and so are plans that are stored.
    shared.tensors.v = shared.k.data();
    wh_plan *plan = nullptr, *again = nullptr;
    ASSERT_EQ(wh_plan_create(&shared.problem, &shared.limits, &plan), WH_OK);
    const std::string json = wh_plan_json(plan);
    EXPECT_NE(json.find("\"values_in_keys\": true"), std::string::npos);
    ASSERT_EQ(wh_plan_from_json(json.data(), json.size(), &again), WH_OK) << wh_last_error();
    EXPECT_EQ(shared.run(), WH_OK) << wh_last_error();
    wh_plan_destroy(plan);
    wh_plan_destroy(again);
  }
}

// The rows have the bits that they have in the whole batch, and nothing else is written.
TEST(CApi, APlanRunsAnySmallerBatch) {
  for (size_t i = 0; wh_kernel_name(WH_CPU, i) != nullptr; ++i) {
    Call call;
    call.limits.kernel = wh_kernel_name(WH_CPU, i);
    call.problem.batch = 3;
    ASSERT_EQ(wh_problem_set_dense(&call.problem), WH_OK);
    for (std::vector<float>* data : {&call.q, &call.k, &call.v}) {
      data->resize(3 * data->size());
      for (size_t j = 0; j < data->size(); ++j) (*data)[j] = static_cast<float>(j % 11) / 11;
    }
    const size_t rows = call.out.size();
    std::vector<float> whole(3 * rows), part(3 * rows, -1);
    call.tensors.q = call.q.data();
    call.tensors.k = call.k.data();
    call.tensors.v = call.v.data();
    wh_plan* plan = nullptr;
    const wh_status status = wh_plan_create(&call.problem, &call.limits, &plan);
    if (status == WH_REFUSED) {
      wh_plan_destroy(plan);
      continue;
    }
    ASSERT_EQ(status, WH_OK) << wh_last_error();
    std::vector<char> memory(wh_plan_workspace_bytes(plan) + WH_WORKSPACE_ALIGNMENT);
    void* workspace = memory.data();
    size_t space = memory.size();
    call.tensors.workspace =
        std::align(WH_WORKSPACE_ALIGNMENT, wh_plan_workspace_bytes(plan), workspace, space);
    call.tensors.workspace_bytes = wh_plan_workspace_bytes(plan);
    call.tensors.out = whole.data();
    EXPECT_EQ(wh_plan_run(plan, &call.tensors, nullptr), WH_OK) << wh_last_error();
    call.tensors.out = part.data();
    call.tensors.batch = 2;
    EXPECT_EQ(wh_plan_run(plan, &call.tensors, nullptr), WH_OK) << wh_last_error();
    wh_plan_destroy(plan);
    for (size_t j = 0; j < part.size(); ++j) {
      ASSERT_EQ(part[j], j < 2 * rows ? whole[j] : -1) << call.limits.kernel << j;
    }
  }
}

TEST(CApi, ZeroSizesAreValid) {
  for (const int field : {0, 1, 2}) {
    Call call;
    (field == 0 ? call.problem.batch : field == 1 ? call.problem.len_q : call.problem.len_k) = 0;
    ASSERT_EQ(wh_problem_set_dense(&call.problem), WH_OK);
    if (field == 2) call.tensors.k = call.tensors.v = nullptr;
    ASSERT_EQ(call.run(), WH_OK) << wh_last_error();
    if (field == 2) {
      for (const float value : call.out) EXPECT_EQ(value, 0.0f);
    } else {
      EXPECT_TRUE(call.out_is_untouched());
    }
  }
}

TEST(CApi, ARefusedPlanCanBeExplainedButNotRun) {
  Call call;
  call.limits.workspace_bytes = 10;
  wh_plan* plan = nullptr;
  ASSERT_EQ(wh_plan_create(&call.problem, &call.limits, &plan), WH_REFUSED);
  ASSERT_NE(plan, nullptr);
  EXPECT_STREQ(wh_plan_kernel(plan), "");
  EXPECT_NE(std::string(wh_plan_explain(plan)).find("over_budget"), std::string::npos);
  EXPECT_EQ(wh_plan_run(plan, &call.tensors, nullptr), WH_REFUSED);
  EXPECT_TRUE(call.out_is_untouched());
  wh_plan_destroy(plan);
}

TEST(CApi, APlanIsStoredAndRunAgain) {
  Call call;
  wh_plan *plan = nullptr, *again = nullptr;
  ASSERT_EQ(wh_plan_create(&call.problem, nullptr, &plan), WH_OK);
  const std::string json = wh_plan_json(plan);
  ASSERT_EQ(wh_plan_from_json(json.data(), json.size(), &again), WH_OK) << wh_last_error();
  std::vector<char> workspace(wh_plan_workspace_bytes(again) + 64);
  call.tensors.workspace =
      reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64);
  call.tensors.workspace_bytes = wh_plan_workspace_bytes(again);
  EXPECT_EQ(wh_plan_run(again, &call.tensors, nullptr), WH_OK) << wh_last_error();
  EXPECT_FLOAT_EQ(call.out[7], 2.0f);
  EXPECT_GT(wh_plan_estimated_us(again), 0);
  wh_plan_destroy(plan);
  wh_plan_destroy(again);
}

TEST(CApi, ANewPlansLineGoesToTheCallback) {
  std::vector<std::string> lines;
  wh_set_plan_log(
      [](void* context, const char* line) {
        static_cast<std::vector<std::string>*>(context)->push_back(line);
      },
      &lines);
  Call call;
  call.limits.fused_above = 12345;  // in no cache yet
  ASSERT_EQ(call.run(), WH_OK);
  ASSERT_EQ(call.run(), WH_OK);
  wh_set_plan_log(nullptr, nullptr);
  ASSERT_EQ(lines.size(), 1u);
  EXPECT_NE(lines[0].find("workspace, about "), std::string::npos) << lines[0];
  EXPECT_NE(lines[0].find("; then cpu_"), std::string::npos) << lines[0];
}

TEST(CApi, ThePlanLogMayPlanAndReplaceItself) {
  static int lines = 0;
  wh_set_plan_log(
      [](void*, const char*) {
        ++lines;
        Call inner;
        inner.limits.fused_above = 23456;
        EXPECT_EQ(inner.run(), WH_OK) << wh_last_error();
        wh_set_plan_log(nullptr, nullptr);
      },
      nullptr);
  Call call;
  call.limits.fused_above = 23457;
  ASSERT_EQ(call.run(), WH_OK) << wh_last_error();
  call.limits.fused_above = 23458;
  ASSERT_EQ(call.run(), WH_OK) << wh_last_error();
  EXPECT_EQ(lines, 1);
}

TEST(CApi, TheCallersExecutorAndProgressAreUsed) {
  Call call;
  int tasks = 0, reports = 0;
  const wh_executor executor{
      [](void* context, int32_t count, void (*task)(void*, int32_t), void* argument) {
        for (int32_t i = 0; i < count; ++i) task(argument, i);
        *static_cast<int*>(context) += count;
      },
      &tasks};
  call.options.executor = &executor;
  call.options.progress = [](void* context, double) {
    ++*static_cast<int*>(context);
    return 0;
  };
  call.options.progress_context = &reports;
  call.limits.threads = 2;
  call.limits.kernel = "cpu_reference";
  ASSERT_EQ(call.run(), WH_OK) << wh_last_error();
  EXPECT_EQ(tasks, 2);
  EXPECT_EQ(reports, 6);  // one for each row
  call.options.progress = [](void*, double) { return int32_t{1}; };
  EXPECT_EQ(call.run(), WH_CANCELLED);
  EXPECT_NE(std::string(wh_last_error()).find("out is partly written"), std::string::npos);
}

TEST(CApi, WithoutQueriesNothingIsReadKeyLengthsAndStartsIncluded) {
  Call call;
  call.problem.len_q = 0;
  call.problem.uses = WH_USES_KEY_LENGTHS | WH_USES_KEY_STARTS;
  call.tensors.key_lengths = call.tensors.key_starts = nullptr;
  EXPECT_EQ(call.run(), WH_OK) << wh_last_error();
  EXPECT_TRUE(call.out_is_untouched());
}

TEST(CApi, WithoutSequencesPackedTokensStayAsTheyAreAndNoOffsetIsRead) {
  Call call;
  call.problem.batch = 0;
  call.problem.query_layout = WH_QUERIES_PACKED;
  call.problem.total_q = call.problem.len_q;
  ASSERT_EQ(wh_problem_set_dense(&call.problem), WH_OK);
  call.tensors.query_offsets = nullptr;
  EXPECT_EQ(call.run(), WH_OK) << wh_last_error();
  EXPECT_TRUE(call.out_is_untouched());
}

}  // namespace
}  // namespace wh
