// A range of queries against a range of keys, as a problem of its own.
#pragma once

#include <vector>

#include "parallel/shards.h"

namespace wh::sharded {

// Neighbours of the batch whose keys begin and end alike: their diagonal is one.
struct KeyGroup {
  int64_t batch_begin, batch_end;
  TokenRange present;
};
std::vector<KeyGroup> key_groups(const ShardedProblem& problem);

// What is left of two ranges once rows that see nothing and keys that nobody sees are cut off, and
// the window around the diagonal of what is left. Causal is a window too.
struct View {
  TokenRange q, k;
  int64_t window_left = kUnlimited, window_right = kUnlimited;

  bool empty() const { return q.empty() || k.empty(); }
};
View view_of(const Problem& whole, TokenRange present, TokenRange q, TokenRange k);

// The keys of `k` that some query of `q` sees, in any of the batch: their hull.
TokenRange seen_keys(const ShardedProblem& problem, TokenRange q, TokenRange k);
// The queries of `q` that see a key of `k`.
TokenRange seeing_queries(const ShardedProblem& problem, TokenRange q, TokenRange k);

}  // namespace wh::sharded
