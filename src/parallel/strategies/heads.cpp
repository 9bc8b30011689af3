// All-to-all: every rank takes all tokens of some heads, or one rank those of all.
#include "parallel/strategies/builder.h"

namespace wh::sharded {

Schedule Builder::heads(const std::vector<Heads>& shares) {
  const Heads mine = shares[static_cast<size_t>(rank_)];
  const TokenRange all_q{0, p_.len_q}, all_k{0, p_.len_k};
  const Block q{all_q, token_major(p_.len_q, mine.q(), p_.dim_qk, q_.element_bytes)};
  const KeyBlock keys{{all_k, token_major(p_.len_k, mine.kv(), p_.dim_qk, k_.element_bytes)},
                      {all_k, value_buffer(p_.len_k, mine.kv())}};
  std::vector<Message> messages;
  const auto scatter = [&](const TensorAt& local, const Block& whole, const auto& tokens_of,
                           int64_t dim, int64_t(Heads::*begin), int64_t(Heads::*end)) {
    for_each_rank([&](int32_t peer) {
      const Heads& theirs = shares[static_cast<size_t>(peer)];
      const int64_t heads = theirs.*end - theirs.*begin;
      int64_t first = 0;
      for (const TokenRange& range : tokens_of(rank_)) {
        const TensorAt from = local.at(0, theirs.*begin, first);
        first += range.size();
        if (heads == 0 || range.empty()) continue;
        if (peer == rank_) {
          copy_tokens({range, from}, whole, range, heads, dim);
        } else {
          const Block packed{range, token_major(range.size(), heads, dim, local.element_bytes)};
          copy_tokens({range, from}, packed, range, heads, dim);
          exchange(messages, peer, true, packed, range);
        }
      }
      if (peer == rank_ || mine.*end == mine.*begin) return;
      for (const TokenRange& range : tokens_of(peer)) {
        if (!range.empty()) exchange(messages, peer, false, whole, range);
      }
    });
  };
  const auto of_q = [&](int32_t rank) -> const Tokens& { return tokens_q(rank); };
  const auto of_k = [&](int32_t rank) -> const Tokens& { return tokens_k(rank); };
  scatter(q_, q, of_q, p_.dim_qk, &Heads::q_begin, &Heads::q_end);
  scatter(k_, keys.k, of_k, p_.dim_qk, &Heads::kv_begin, &Heads::kv_end);
  if (!p_.values_in_keys) {
    scatter(v_, keys.v, of_k, p_.dim_v, &Heads::kv_begin, &Heads::kv_end);
  }
  start(0, std::move(messages));
  finish(0);

  const Block out{all_q, token_major(p_.len_q, mine.q(), p_.dim_v, out_.element_bytes)};
  const Block lse{all_q,
                  p_.wants_log_sum_exp ? token_major(p_.len_q, mine.q(), 1, kFloat) : TensorAt{}};
  if (mine.q() > 0) finish_rows(q, keys, out, lse, mine);

  std::vector<Message> answers;
  std::vector<Copy> unpack;
  const auto collect = [&](const TensorAt& local, const Block& whole, int64_t dim) {
    for_each_rank([&](int32_t peer) {
      const Heads& theirs = shares[static_cast<size_t>(peer)];
      if (mine.q() > 0 && peer != rank_) {
        for (const TokenRange& range : tokens_q(peer)) {
          if (!range.empty()) exchange(answers, peer, true, whole, range);
        }
      }
      int64_t first = 0;
      for (const TokenRange& range : tokens_q(rank_)) {
        const TensorAt to = local.at(0, theirs.q_begin, first);
        first += range.size();
        if (theirs.q() == 0 || range.empty()) continue;
        Block from = whole;
        if (peer != rank_) {
          from = {range, token_major(range.size(), theirs.q(), dim, local.element_bytes)};
          exchange(answers, peer, false, from, range);
        }
        unpack.push_back(
            {from.at(0, 0, range.begin), to, {p_.batch, theirs.q(), range.size(), dim}});
      }
    });
  };
  collect(out_, out, p_.dim_v);
  if (p_.wants_log_sum_exp) collect(lse_, lse, 1);
  start(1, std::move(answers));
  finish(1);
  for (const Copy& copy : unpack) schedule_.steps.push_back(copy);
  return finished();
}

}  // namespace wh::sharded
