// Planning for this machine and running, between the C structs and the core.
#pragma once

#include <memory>

#include "api/c_structs.h"
#include "api/workspace.h"
#include "plan/plan.h"

namespace wh {

// A new plan, logged where a log is set.
Result<Plan> plan_here(const Problem& problem, const Limits& limits);

// One that can run, made once for equal problems and limits.
Result<std::shared_ptr<const Plan>> cached_plan(const Problem& problem, const Limits& limits);

// Checks the tensors and runs. Without a workspace of the caller's, `own` is one that was allocated
// for this call.
Status run_plan(const Plan& plan, const Tensors& tensors, const RunOptions& options,
                const Workspace* own = nullptr);

}  // namespace wh
