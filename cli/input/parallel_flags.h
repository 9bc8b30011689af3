// PARALLEL of the command line: ranks, what connects them, and which tokens each holds.
#pragma once

#include <cstdint>
#include <string>

#include "input/problem_flags.h"
#include "parallel/plan.h"

namespace wh::cli {

// As written; empty: not given.
struct ParallelFlags {
  int32_t ranks = 0;  // 0: not given
  std::string link, tokens, strategy, card;
};

void add_parallel_flags(CLI::App& app, ParallelFlags& flags);
void add_ranks_flag(CLI::App& app, ParallelFlags& flags, const char* help);

// A flag that says something of ranks, where there are none: `first` is what makes them. Ok without
// one.
Status refuse_parallel_flags(const ParallelFlags& flags, const char* first);

// "400GB/s", or with the time of a message "400GB/s,5us".
Result<sharded::Link> read_link(const std::string& text, double memory_gbytes_per_s);

// The request cut as --tokens says: contiguous, or zigzag where causal work should be even.
Result<sharded::ShardedProblem> read_sharded(const ParallelFlags& flags, const Request& request,
                                             int32_t ranks);

// Plans as the library does; with --card for a card that need not be there.
struct PlannerFor {
  sharded::PlanOne plan_one;
  double memory_gbytes_per_s;
};
Result<PlannerFor> planner_for(const ParallelFlags& flags, const Problem& problem);

}  // namespace wh::cli
