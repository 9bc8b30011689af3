// The C API's structs and what the core makes of them.
#pragma once

#include <span>

#include "api/sized_struct.h"
#include "core/executor.h"
#include "core/problem.h"
#include "core/progress.h"
#include "core/status.h"
#include "plan/kernel.h"
#include "widehead/widehead.h"

namespace wh {

// What an init function writes, and how much of a struct the first release had.
const SizedStruct<wh_problem>& problem_struct();
const SizedStruct<wh_limits>& limits_struct();
constexpr SizedStruct<wh_tensors> kTensorsStruct{"tensors", 96, {}};
constexpr SizedStruct<wh_run_options> kRunOptionsStruct{"run_options", 40, {}};
constexpr SizedStruct<wh_merged> kMergedStruct{"merged", 128, {}};
constexpr SizedStruct<wh_appended> kAppendedStruct{"appended", 128, {}};

// Validated. The environment has a say in limits.
Status read_problem(const wh_problem* from, Problem& to);
// What dense strides follow from, of a problem that has no valid ones yet.
Status read_layout(const wh_problem& from, Problem& to);
Status read_limits(const wh_limits* from, const Problem& problem, Limits& to);
Status read_tensors(const wh_tensors* from, Tensors& to);

struct RunOptions {
  Executor executor = default_executor();
  void* stream = nullptr;
  Progress::Callback progress = nullptr;
  void* progress_context = nullptr;
  std::span<const Kernel* const> kernels =
      {};  // that the plan chose among; empty: the device's own
};

Status read_run_options(const wh_run_options* from, RunOptions& to);

// The other way: what a caller would have written.
wh_problem problem_of(const Problem& p);

}  // namespace wh
