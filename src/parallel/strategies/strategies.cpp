#include "parallel/strategies/strategies.h"

#include <fmt/format.h>

#include "parallel/strategies/builder.h"

namespace wh::sharded {
namespace {

// Even shares of whole kv heads, or of the query heads of one where there are more ranks than kv
// heads; empty where neither comes out even enough for kernels, which want one group for all.
std::vector<Heads> even_heads(const Problem& p, int32_t ranks) {
  std::vector<Heads> all;
  for (int64_t r = 0; r < ranks; ++r) {
    if (p.heads_kv >= ranks) {
      const int64_t begin = p.heads_kv * r / ranks, end = p.heads_kv * (r + 1) / ranks;
      all.push_back({begin * p.group(), end * p.group(), begin, end});
    } else {
      if (ranks % p.heads_kv != 0 || p.group() % (ranks / p.heads_kv) != 0) return {};
      const int64_t share = p.group() * p.heads_kv / ranks, kv = r * p.heads_kv / ranks;
      all.push_back({r * share, (r + 1) * share, kv, kv + 1});
    }
  }
  return all;
}

int32_t rank_with_most_keys(const ShardedProblem& s) {
  int32_t most = 0;
  for (int32_t r = 1; r < s.ranks(); ++r) {
    if (s.local_len_k(r) > s.local_len_k(most)) most = r;
  }
  return most;
}

std::vector<Heads> heads_on_one(const ShardedProblem& s) {
  std::vector<Heads> all(s.q.size(), Heads{0, 0, 0, 0});
  all[static_cast<size_t>(rank_with_most_keys(s))] = all_heads(s.whole);
  return all;
}

// Whether no rank has a token at an index above its own. A part of the keys of a page begins at the
// page in the mask too, which might else lie before the mask.
bool all_ascend(const Sharding& sharding) {
  for (const Tokens& tokens : sharding) {
    int64_t first = 0;
    for (const TokenRange& range : tokens) {
      if (!range.empty() && range.begin < first) return false;
      first += range.size();
    }
  }
  return true;
}

}  // namespace

int64_t Schedule::sent_bytes() const {
  int64_t bytes = 0;
  for (const Step& step : steps) {
    const auto* start = std::get_if<Start>(&step);
    if (start == nullptr) continue;
    for (const Message& message : start->messages) {
      if (message.is_send) bytes += message.bytes;
    }
  }
  return bytes;
}

std::string refusal(const ShardedProblem& s, Strategy strategy) {
  if (s.whole.key_layout == KeyLayout::kPaged) {
    if (strategy != Strategy::kQueries) {
      return "key_layout is paged; only queries leaves K and V where they are";
    }
    if (s.whole.mask != MaskKind::kNone && !all_ascend(s.k)) {
      return fmt::format("mask is {} and key_layout paged; each rank's tokens of k must ascend",
                         kMasks.name(s.whole.mask));
    }
  }
  if (strategy == Strategy::kHeads && even_heads(s.whole, s.ranks()).empty()) {
    return fmt::format("{} query heads of {} kv heads have no even shares for {} ranks",
                       s.whole.heads_q, s.whole.heads_kv, s.ranks());
  }
  return "";
}

Schedule make_schedule(const ShardedProblem& s, Strategy strategy, int32_t rank) {
  Builder builder(s, rank);
  switch (strategy) {
    case Strategy::kRing:
      return builder.ring();
    case Strategy::kGather:
      return builder.gather();
    case Strategy::kHeads:
      return builder.heads(even_heads(s.whole, s.ranks()));
    case Strategy::kQueries:
      return builder.queries();
    case Strategy::kOneRank:
      break;
  }
  return builder.heads(heads_on_one(s));
}

}  // namespace wh::sharded
