// Every rank takes all K and V that its queries see, then attends once.
#include "parallel/strategies/builder.h"

namespace wh::sharded {

Schedule Builder::gather() {
  const auto seen_by = [&](int32_t rank) {
    TokenRange seen;
    for (const TokenRange& q : tokens_q(rank)) {
      seen = hull(seen, seen_keys(s_, q, {0, p_.len_k}));
    }
    return seen;
  };
  const TokenRange seen = seen_by(rank_);
  const auto mine = local_keys();
  const bool sends = has_peer([&](int32_t peer) {
    const TokenRange theirs = seen_by(peer);
    return std::any_of(mine.begin(), mine.end(), [&](const KeyBlock& block) {
      return !intersection(block.k.tokens, theirs).empty();
    });
  });
  const auto packed = sends ? pack_keys() : mine;
  const KeyBlock all{{seen, token_major(seen.size(), p_.heads_kv, p_.dim_qk, k_.element_bytes)},
                     {seen, value_buffer(seen.size(), p_.heads_kv)}};
  std::vector<Message> messages;
  for_each_peer([&](int32_t peer) {
    for (const TokenRange& range : tokens_k(peer)) {
      const TokenRange part = intersection(range, seen);
      if (!part.empty()) exchange_keys(messages, peer, false, all, part);
    }
    const TokenRange theirs = seen_by(peer);
    for (const KeyBlock& block : packed) {
      const TokenRange part = intersection(block.k.tokens, theirs);
      if (!part.empty()) exchange_keys(messages, peer, true, block, part);
    }
  });
  start(0, std::move(messages));
  for (const KeyBlock& block : packed) {
    const TokenRange part = intersection(block.k.tokens, seen);
    if (part.empty()) continue;
    copy_tokens(block.k, all.k, part, p_.heads_kv, p_.dim_qk);
    if (!p_.values_in_keys) copy_tokens(block.v, all.v, part, p_.heads_kv, p_.dim_v);
  }
  finish(0);
  const Block out = local_block(out_);
  int64_t first = 0;
  for (const TokenRange& q : tokens_q(rank_)) {
    const Block queries{q, q_.at(0, 0, first)};
    const Block answers{q, out.tensor.at(0, 0, first)};
    finish_rows(queries, all, answers, Block{q, lse_.at(0, 0, first)}, all_heads(p_));
    first += q.size();
  }
  return finished();
}

}  // namespace wh::sharded
