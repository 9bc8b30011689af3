// Carries out what a rank's plan says.
#pragma once

#include "api/run.h"
#include "parallel/communicator.h"
#include "parallel/plan.h"

namespace wh::sharded {

struct ParallelRun {
  RunOptions options;  // executor and stream; progress belongs to the connection
  std::chrono::milliseconds timeout{30000};  // of one wait for other ranks
};

// Whether all ranks ask for the same: every rank answers with the same error where one does not, or
// where one has something wrong of its own (`own`), which names the rank and the field.
Status agree(const ShardedProblem& problem, Strategy strategy, const Status& own,
             Communicator& communicator, const ParallelRun& run);

// `tensors` are the rank's own: q, k, v, out and log_sum_exp of its tokens, the mask and the sinks
// whole, and plan.workspace_bytes of workspace.
Status run_rank(const ShardedProblem& problem, const RankPlan& plan, const Tensors& tensors,
                Communicator& communicator, const ParallelRun& run);

}  // namespace wh::sharded
