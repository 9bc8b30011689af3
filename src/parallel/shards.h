// Which tokens of one long attention each rank holds.
#pragma once

#include <cstdint>
#include <vector>

#include "core/problem.h"
#include "core/status.h"

namespace wh::sharded {

struct TokenRange {
  int64_t begin = 0, end = 0;

  int64_t size() const { return end > begin ? end - begin : 0; }
  bool empty() const { return end <= begin; }
  bool operator==(const TokenRange&) const = default;
};
TokenRange intersection(TokenRange a, TokenRange b);
// The least that holds both; an empty one does not count.
TokenRange hull(TokenRange a, TokenRange b);

// What a rank holds, in the order in which its tensors have it. A token belongs to one rank.
using Tokens = std::vector<TokenRange>;
int64_t count(const Tokens& tokens);

// Of each rank.
using Sharding = std::vector<Tokens>;
// Even parts, the first ones take what is left over.
Sharding contiguous(int64_t length, int32_t ranks);
// Twice as many parts as ranks, of which rank i has the i-th from the front and from the end: with
// a causal diagonal all ranks then see about as many keys.
Sharding zigzag(int64_t length, int32_t ranks);

// How a rank's tensors, [batch, heads, its tokens, dim], lie in its memory. Paged: pages of its own
// pool, which a table of its own lists; the tokens of its ranges follow each other in them.
struct LocalLayout {
  Strides q{}, k{}, v{}, out{};
  int64_t pages = 0, stride_page_table = 0;
  bool operator==(const LocalLayout&) const = default;
};

struct ShardedProblem {
  // All tokens of all ranks. Strides are of the mask alone, which every rank has whole; key lengths
  // and starts are below, and each rank's pages in its layout.
  Problem whole;
  Sharding q, k;
  std::vector<LocalLayout> layouts;              // of each rank
  std::vector<int32_t> key_lengths, key_starts;  // [batch], of the whole's keys; empty: not used

  int32_t ranks() const { return static_cast<int32_t>(q.size()); }
  int64_t local_len_q(int32_t rank) const { return count(q[static_cast<size_t>(rank)]); }
  int64_t local_len_k(int32_t rank) const { return count(k[static_cast<size_t>(rank)]); }
};

// The whole as contiguous tensors, or full pages, of each rank.
ShardedProblem shard(const Problem& whole, Sharding q, Sharding k);

// The same with keys side by side, where they are paged.
Problem with_dense_keys(Problem problem);

// A rank's tensors against each other: of their shape and strides, not what the rank computes.
Problem local_problem(const ShardedProblem& problem, int32_t rank);

// The first thing wrong, with its rank.
Status validate(const ShardedProblem& problem);

}  // namespace wh::sharded
