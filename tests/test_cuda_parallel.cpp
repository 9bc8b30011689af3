// What ranks of CUDA devices would run. No GPU is needed: the planner takes a card's facts.
#include <gtest/gtest.h>

#include "api/machine.h"
#include "cuda/registry.h"
#include "parallel/plan.h"
#include "support/cards.h"
#include "support/sharded_case.h"

namespace wh::sharded {
namespace {

Result<Plan> plan_for_h200(const Problem& problem, const Limits& limits) {
  return make_plan(problem, limits, {h200(), kernels_of(Device::kCuda)});
}

ShardedProblem over_four(Problem p) {
  p.device = Device::kCuda;
  return shard(p, zigzag(p.len_q, 4), zigzag(p.len_k, 4));
}

// Whatever a kernel would write is rounded to 16 bits but once, in out.
TEST(CudaParallel, PartsThatAreMergedAreF32) {
  const ShardedProblem prefill = over_four(causal(64, 2, 256, 16384, 16384));
  const ShardedProblem decode = over_four(causal(64, 2, 256, 1, 65536));
  for (const ShardedProblem* s : {&prefill, &decode}) {
    for (const Strategy strategy : {Strategy::kRing, Strategy::kQueries}) {
      const auto plan = make_rank_plan(*s, strategy, 0, {}, plan_for_h200);
      ASSERT_TRUE(plan.ok()) << plan.status().message();
      ASSERT_FALSE(plan->plans.empty());
      for (const auto& one : plan->plans) {
        EXPECT_EQ(one->problem.dtype_out(), Dtype::kF32) << describe(one->problem);
        if (one->problem.len_k == 0) continue;
        EXPECT_TRUE(one->kernel == "sm90_decode" || one->kernel == "cuda_portable") << one->kernel;
      }
      for (const Step& step : plan->schedule.steps) {
        const auto* merge = std::get_if<Merge>(&step);
        if (merge == nullptr) continue;
        for (const Part& part : merge->parts) EXPECT_EQ(part.dtype, Dtype::kF32);
      }
    }
  }
  // Nothing is merged where all keys are at hand.
  const auto gather = make_rank_plan(prefill, Strategy::kGather, 0, {}, plan_for_h200);
  ASSERT_TRUE(gather.ok());
  for (const auto& one : gather->plans) EXPECT_EQ(one->kernel, "sm90_prefill");
}

// What docs/parallel.md says of four of them.
TEST(CudaParallel, FourAreWorthTheirWhile) {
  struct Aim {
    Problem problem;
    Strategy strategy;
    double times_as_fast;
  };
  const Aim aims[] = {
      {causal(64, 2, 256, 131072, 131072), Strategy::kGather, 0.9 * 4},
      {causal(32, 8, 128, 131072, 131072), Strategy::kGather, 0.9 * 4},
      {causal(64, 2, 256, 2048, 524288), Strategy::kGather, 0.88 * 4},
      {causal(64, 2, 256, 1, 524288), Strategy::kQueries, 2.5},
  };
  for (const Aim& aim : aims) {
    const auto plan = make_parallel_plan(over_four(aim.problem), {},
                                         {400, 5, h200().read_gbytes_per_s}, plan_for_h200);
    ASSERT_TRUE(plan.ok() && plan->runnable());
    EXPECT_EQ(plan->best().strategy, aim.strategy) << explain(*plan);
    EXPECT_GT(plan->alone_us, aim.times_as_fast * plan->best().estimated_us) << explain(*plan);
  }
}

}  // namespace
}  // namespace wh::sharded
