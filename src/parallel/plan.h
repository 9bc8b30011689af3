// Which strategy, with which workspace on each rank, in about what time: asked before anything
// runs, and without any of the ranks.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "parallel/simulation.h"
#include "parallel/strategies/strategies.h"
#include "plan/plan.h"

namespace wh::sharded {

// The plan of one attention on a rank's device, refused ones included.
using PlanOne = std::function<Result<Plan>(const Problem&, const Limits&)>;

struct ParallelLimits {
  Limits each;           // of every rank; workspace_bytes is for all that a rank needs
  std::string strategy;  // forces one by name; empty: the planner chooses
};

// A schedule with the plans of its attentions and its memory laid out: what an executor takes.
struct RankPlan {
  Schedule schedule;
  std::vector<std::shared_ptr<const Plan>> plans;
  std::vector<size_t> offsets;  // of the buffers in the workspace
  size_t kernel_offset = 0;     // of what the kernels take
  size_t workspace_bytes = 0;
};

struct StrategyCandidate {
  Strategy strategy;
  Verdict verdict = Verdict::kRefused;
  std::string reason;
  double estimated_us = 0;
  std::vector<uint64_t> workspace_bytes;  // of each rank
  int64_t sent_bytes = 0;                 // by all ranks
  Simulation simulation;
};

struct ParallelPlan {
  ShardedProblem problem;
  Link link;
  std::vector<StrategyCandidate> candidates;
  int32_t chosen = -1;  // of the candidates; -1: none is allowed
  // On a device that had everything, without a message; 0: no kernel takes it there.
  double alone_us = 0;

  bool runnable() const { return chosen >= 0; }
  const StrategyCandidate& best() const { return candidates[static_cast<size_t>(chosen)]; }
};

Result<ParallelPlan> make_parallel_plan(const ShardedProblem& problem, const ParallelLimits& limits,
                                        const Link& link, const PlanOne& plan_one);
// Why a plan that is not runnable is not.
Status runnable_status(const ParallelPlan& plan);

// What one rank needs to run it.
Result<RankPlan> make_rank_plan(const ShardedProblem& problem, Strategy strategy, int32_t rank,
                                const Limits& limits, const PlanOne& plan_one);

std::string explain(const ParallelPlan& plan);

}  // namespace wh::sharded
