// Every rank's share of 1 to 8 ranks on one GPU, with copies in place of what would connect
// several, against float64 of the whole. The library's own objects: it reaches what the shared one
// hides.
#include <gtest/gtest.h>

#include <thread>

#include "api/machine.h"
#include "api/workspace.h"
#include "parallel/executor.h"
#include "support/sharded_case.h"
#include "support/thread_communicator.h"

namespace wh::sharded {
namespace {

const Backend& gpu() { return backend(Device::kCuda); }

Result<Plan> plan_on_gpu(const Problem& problem, const Limits& limits) {
  return make_plan(problem, limits, this_machine(Device::kCuda, 0));
}

// What a rank has, on the device.
class OnDevice {
 public:
  template <typename T>
  T* upload(const std::vector<T>& from) {
    return static_cast<T*>(place(from.data(), from.size() * sizeof(T)));
  }
  void* place(const void* from, size_t bytes) {
    Result<Workspace> memory = Workspace::allocate({Device::kCuda, {}}, bytes);
    EXPECT_TRUE(memory.ok()) << memory.status().message();
    void* data = memory->data();
    if (bytes > 0 && from != nullptr) {
      EXPECT_TRUE(gpu().copy({}, data, from, bytes).ok());
    }
    memory_.push_back(std::move(*memory));
    return data;
  }

 private:
  std::vector<Workspace> memory_;
};

Status run_one(const ShardedData& data, Strategy strategy, int32_t rank, Communicator& group,
               LocalTensors& local) {
  const ShardedProblem& s = data.problem();
  OnDevice device;
  const Tensors host = data.tensors(local);
  Tensors t;
  t.q = device.upload(local.q);
  t.k = device.upload(local.k);
  t.v = device.upload(local.v);
  t.out = device.upload(local.out);
  t.log_sum_exp = device.upload(local.log_sum_exp);
  const TensorBytes bytes = tensor_bytes(data.whole());
  if (bytes.mask > 0) t.mask = device.place(host.mask, static_cast<size_t>(bytes.mask));
  if (bytes.sinks > 0) {
    t.sinks = static_cast<const float*>(device.place(host.sinks, static_cast<size_t>(bytes.sinks)));
  }
  WH_RETURN_IF_ERROR(agree(s, strategy, {}, group, {}));
  const Result<RankPlan> plan = make_rank_plan(s, strategy, rank, {}, plan_on_gpu);
  if (!plan.ok()) return plan.status();
  t.workspace = device.place(nullptr, plan->workspace_bytes);
  t.workspace_bytes = plan->workspace_bytes;
  WH_RETURN_IF_ERROR(run_rank(s, *plan, t, group, {}));
  WH_RETURN_IF_ERROR(gpu().synchronize({}));
  const auto fetch = [](void* to, const void* from, size_t count) -> Status {
    return count == 0 ? Status() : gpu().copy({}, to, from, count);
  };
  WH_RETURN_IF_ERROR(fetch(local.out.data(), t.out, local.out.size()));
  return fetch(local.log_sum_exp.data(), t.log_sum_exp, local.log_sum_exp.size() * sizeof(float));
}

class GpuParallel : public testing::TestWithParam<Strategy> {
 protected:
  void SetUp() override {
    const std::string& reason = gpu().facts(0).unavailable;
    if (!reason.empty()) GTEST_SKIP() << reason;
  }
};

TEST_P(GpuParallel, IsTheWholeInFloat64) {
  for (uint64_t seed = 2000; seed < 2060; ++seed) {
    const auto ranks = int32_t{1} << (seed % 4);
    ShardedData data = random_case(ranks, seed, Device::kCuda);
    SCOPED_TRACE(std::to_string(seed) + ", " + std::to_string(ranks) +
                 " ranks: " + describe(data.whole()));
    if (!refusal(data.problem(), GetParam()).empty()) continue;
    ThreadGroup group(ranks, [](void* to, const void* from, size_t bytes) -> Status {
      WH_RETURN_IF_ERROR(gpu().copy({}, to, from, bytes));
      return gpu().synchronize({});
    });
    std::vector<LocalTensors> locals;
    std::vector<Status> statuses(static_cast<size_t>(ranks));
    for (int32_t r = 0; r < ranks; ++r) locals.push_back(data.local(r));
    std::vector<std::thread> threads;
    for (int32_t r = 0; r < ranks; ++r) {
      threads.emplace_back([&, r] {
        ThreadGroup::Member member(group, r, [] { return gpu().synchronize({}); });
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
