// Queries go to the keys; partial states come back and are merged.
#include "parallel/strategies/builder.h"

namespace wh::sharded {

Schedule Builder::queries() {
  begin_sum();
  const bool sends = has_peer([&](int32_t peer) { return !asking(rank_, peer).empty(); });
  const auto packed = sends ? pack_queries() : local_queries();
  std::vector<Message> messages;
  std::vector<std::vector<Block>> asked(s_.q.size());  // of each peer
  for_each_peer([&](int32_t peer) {
    for (const TokenRange& range : asking(peer, rank_)) {
      const Block block{range, token_major(range.size(), p_.heads_q, p_.dim_qk, q_.element_bytes)};
      exchange(messages, peer, false, block, range);
      asked[static_cast<size_t>(peer)].push_back(block);
    }
    for (const TokenRange& range : asking(rank_, peer)) {
      exchange(messages, peer, true, block_with(packed, range), range);
    }
  });
  start(0, std::move(messages));
  const auto mine = local_keys();
  for (const KeyBlock& block : mine) attend_to(block);
  finish(0);
  std::vector<Message> answers;
  struct Arriving {
    KeyGroup group;
    View view;
    Part part;
  };
  std::vector<Arriving> arriving;
  for_each_peer([&](int32_t peer) {
    for (const Block& q : asked[static_cast<size_t>(peer)]) {
      each_view(q.tokens, tokens_k(rank_), [&](const KeyGroup& group, const View& view) {
        const Part part = partial_buffers(group, view);
        const KeyBlock& keys = block_with(mine, view.k);
        attend(group, view, q, keys, part.out, part.log_sum_exp, all_heads(p_), true);
        exchange_part(answers, peer, true, group, view, part);
      });
    }
    for (const TokenRange& range : asking(rank_, peer)) {
      each_view(range, tokens_k(peer), [&](const KeyGroup& group, const View& view) {
        const Part part = partial_buffers(group, view);
        exchange_part(answers, peer, false, group, view, part);
        arriving.push_back({group, view, part});
      });
    }
  });
  start(1, std::move(answers));
  finish(1);
  for (const Arriving& each : arriving) add_part(each.group, each.view, each.part);
  end_sum();
  return finished();
}

}  // namespace wh::sharded
