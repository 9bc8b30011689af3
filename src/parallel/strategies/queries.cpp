// Queries go to the keys; partial states come back and are merged.
#include "parallel/strategies/builder.h"

namespace wh::sharded {

Schedule Builder::queries() {
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
  const bool waits_first = are_waited_for(messages);
  start(0, std::move(messages));
  begin_sum();
  if (waits_first) finish(0);
  const auto mine = local_keys();
  for (const KeyBlock& block : mine) attend_to(block);
  if (!waits_first) finish(0);
  std::vector<Message> answers;
  PartsByRows arriving;
  for_each_peer([&](int32_t peer) {
    for (const Block& q : asked[static_cast<size_t>(peer)]) {
      each_piece(q.tokens, tokens_k(rank_), [&](const Piece& piece) {
        const Part part = partial_buffers(piece);
        const KeyBlock& keys = block_with(mine, piece.view.k);
        attend(piece, q, keys, part.out, part.log_sum_exp, all_heads(p_), true);
        exchange_part(answers, peer, true, piece, part);
      });
    }
    for (const TokenRange& range : asking(rank_, peer)) {
      each_piece(range, tokens_k(peer), [&](const Piece& piece) {
        const Part part = partial_buffers(piece);
        exchange_part(answers, peer, false, piece, part);
        add_to(arriving, piece, part);
      });
    }
  });
  start(1, std::move(answers));
  finish(1);
  end_sum(arriving);
  return finished();
}

}  // namespace wh::sharded
