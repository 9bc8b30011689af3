// The ways to share one attention among ranks.
#pragma once

#include <string>

#include "core/names.h"
#include "core/status.h"
#include "parallel/schedule.h"
#include "parallel/shards.h"

namespace wh::sharded {

enum class Strategy : uint8_t {
  kRing,     // K and V go round, one rank's at a time, beside the work on those before
  kGather,   // every rank takes all K and V that its queries see, then attends once
  kHeads,    // every rank takes all tokens of some heads (all-to-all)
  kQueries,  // queries go to the keys; partial states come back and are merged
  kOneRank,  // all of it on the rank that has the most keys
};
constexpr Names<Strategy, 5> kStrategies{{"ring", "gather", "heads", "queries", "one_rank"}};

// Why the strategy cannot take the problem; empty: it can.
std::string refusal(const ShardedProblem& problem, Strategy strategy);

// What `rank` does. The problem must be valid and not refused.
Schedule make_schedule(const ShardedProblem& problem, Strategy strategy, int32_t rank);

}  // namespace wh::sharded
