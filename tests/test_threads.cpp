// What ThreadSanitizer watches: threads of the caller's, as TBB is not built with it. A program of
// its own, so that nothing else of the tests is compiled for it.
#include <gtest/gtest.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "support/attention.h"
#include "support/call.h"

namespace wh {
namespace {

// The plan cache, the profile, the log and the errors of threads.
TEST(ThreadsOfTheCaller, PlanAndRunAtOnce) {
  constexpr int kThreads = 8, kCalls = 100;
  std::atomic<int> lines{0}, wrong{0};
  wh_set_plan_log([](void* context, const char*) { ++*static_cast<std::atomic<int>*>(context); },
                  &lines);
  Call shared;
  wh_plan* plan = nullptr;
  ASSERT_EQ(wh_plan_create(&shared.problem, nullptr, &plan), WH_OK);
  const auto work = [&](int thread) {
    for (int i = 0; i < kCalls; ++i) {
      Call call;
      call.limits.threads = 1;  // TBB is not built for ThreadSanitizer
      call.limits.fused_above = 50000 + thread % 2 * 40 + i;  // more than the cache holds
      wrong += call.run() != WH_OK || call.out[0] != 2.0f;

      wh_plan* own = nullptr;
      wrong += wh_plan_create(&call.problem, &call.limits, &own) != WH_OK;
      std::vector<char> workspace(wh_plan_workspace_bytes(own) + WH_WORKSPACE_ALIGNMENT);
      const auto address = reinterpret_cast<uintptr_t>(workspace.data());
      call.tensors.workspace = reinterpret_cast<void*>(
          (address + WH_WORKSPACE_ALIGNMENT - 1) / WH_WORKSPACE_ALIGNMENT * WH_WORKSPACE_ALIGNMENT);
      call.tensors.workspace_bytes = wh_plan_workspace_bytes(own);
      call.out[0] = 0;
      wrong += wh_plan_run(own, &call.tensors, nullptr) != WH_OK || call.out[0] != 2.0f;
      wh_plan_destroy(own);

      wrong += wh_plan_explain(plan) == nullptr || wh_plan_json(plan) == nullptr;
      call.problem.batch = -1 - thread;
      wrong += call.run() != WH_INVALID_ARGUMENT;
      const std::string expected = "batch is " + std::to_string(-1 - thread) + ";";
      wrong += std::string(wh_last_error()).find(expected) == std::string::npos;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(work, i);
  for (std::thread& thread : threads) thread.join();
  wh_set_plan_log(nullptr, nullptr);
  wh_plan_destroy(plan);
  EXPECT_EQ(wrong, 0);
  // One for each wh_plan_create(), and at least one for each entry that the cache did not have.
  EXPECT_GE(lines, kThreads * kCalls + 140 + 1);
}

using KernelsOnThreadsOfTheCaller = KernelTest;

TEST_P(KernelsOnThreadsOfTheCaller, GiveTheSameBits) {
  Attention attention(4, 2, queries(), 5000, 64);
  attention.limits.threads = 1;
  attention.run(GetParam());
  const std::vector<float> out = attention.out;
  attention.limits.threads = 4;
  const wh_executor threads{[](void*, int32_t count, void (*task)(void*, int32_t), void* argument) {
                              std::vector<std::thread> all;
                              for (int32_t i = 0; i < count; ++i)
                                all.emplace_back(task, argument, i);
                              for (std::thread& thread : all) thread.join();
                            },
                            nullptr};
  for (int repeat = 0; repeat < 3; ++repeat) {
    attention.run(GetParam(), &threads);
    EXPECT_TRUE(same_bits(attention.out, out));
  }
}

INSTANTIATE_TEST_SUITE_P(Every, KernelsOnThreadsOfTheCaller,
                         testing::ValuesIn(kernels_under_test()), kernel_name);

}  // namespace
}  // namespace wh
