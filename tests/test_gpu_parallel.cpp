// Every rank's share of 1 to 8 ranks on one GPU, with copies in place of what would connect
// several, against float64 of the whole. The library's own objects: it reaches what the shared one
// hides.
#include <gtest/gtest.h>

#include <thread>

#include "api/machine.h"
#include "parallel/executor.h"
#include "parallel/threads/group.h"
#include "support/sharded_case.h"
#include "verify/rank_on_device.h"

namespace wh::sharded {
namespace {

const Backend& gpu() { return backend(Device::kCuda); }

Result<Plan> plan_on_gpu(const Problem& problem, const Limits& limits) {
  return make_plan(problem, limits, this_machine(Device::kCuda, 0));
}

Status run_one(const ShardedData& data, Strategy strategy, int32_t rank, Communicator& group,
               LocalTensors& local) {
  const ShardedProblem& s = data.problem();
  Result<RankOnDevice> device = RankOnDevice::make(data, local, 0);
  WH_RETURN_IF_ERROR(agree(s, strategy, device.status(), group, {}));
  const Result<RankPlan> plan = make_rank_plan(s, strategy, rank, {}, plan_on_gpu);
  if (!plan.ok()) return plan.status();
  WH_RETURN_IF_ERROR(device->take_workspace(plan->workspace_bytes));
  WH_RETURN_IF_ERROR(run_rank(s, *plan, device->tensors(), group, {}));
  WH_RETURN_IF_ERROR(gpu().synchronize({}));
  return device->fetch();
}

class GpuParallel : public testing::TestWithParam<Strategy> {
 protected:
  void SetUp() override {
    const std::string& reason = gpu().facts(0).unavailable;
    if (!reason.empty()) GTEST_SKIP() << reason;
  }
};

TEST_P(GpuParallel, IsTheWholeInFloat64) {
  for (uint64_t seed = 2000; seed < 2080; ++seed) {
    const auto ranks = int32_t{1} << (seed % 4);
    const CaseKeys keys = seed < 2060 ? CaseKeys::kDense : CaseKeys::kPaged;
    ShardedData data = random_case(ranks, seed, Device::kCuda, CaseDims::kSmall, keys);
    SCOPED_TRACE(std::to_string(seed) + ", " + std::to_string(ranks) +
                 " ranks: " + describe(data.problem().whole));
    if (!refusal(data.problem(), GetParam()).empty()) continue;
    ThreadGroup group(ranks, Device::kCuda);
    std::vector<LocalTensors> locals;
    std::vector<Status> statuses(static_cast<size_t>(ranks));
    for (int32_t r = 0; r < ranks; ++r) locals.push_back(data.local(r));
    std::vector<std::thread> threads;
    for (int32_t r = 0; r < ranks; ++r) {
      threads.emplace_back([&, r] {
        ThreadGroup::Member member(group, r);
        const auto i = static_cast<size_t>(r);
        statuses[i] = run_one(data, GetParam(), r, member, locals[i]);
      });
    }
    for (std::thread& thread : threads) thread.join();
    data.poison();
    for (int32_t r = 0; r < ranks; ++r) {
      const auto i = static_cast<size_t>(r);
      ASSERT_TRUE(statuses[i].ok()) << "rank " << r << ": " << statuses[i].message();
      data.put(r, locals[i]);
    }
    const std::string difference = data.difference();
    EXPECT_TRUE(difference.empty()) << difference;
  }
}

INSTANTIATE_TEST_SUITE_P(Strategies, GpuParallel,
                         testing::Values(Strategy::kRing, Strategy::kGather, Strategy::kHeads,
                                         Strategy::kQueries, Strategy::kOneRank),
                         [](const auto& info) {
                           return std::string(kStrategies.name(info.param));
                         });

}  // namespace
}  // namespace wh::sharded
