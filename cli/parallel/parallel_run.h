// `widehead run --parallel`: one problem, as the ranks of this process.
#pragma once

#include "input/parallel_flags.h"
#include "parallel/ranks.h"

namespace wh::cli {

struct ParallelRunFlags {
  Request request;
  Limits limits;
  ParallelFlags parallel;
  Transport transport;
  bool every_strategy = false;  // one after another, not the planner's choice alone
  uint64_t seed = 1;
  bool json = false;
};

// Answers with the exit code, the same on every rank.
int run_parallel(const ParallelRunFlags& flags);

}  // namespace wh::cli
