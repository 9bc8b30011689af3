#include "parallel/strategies.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <utility>

#include "parallel/view.h"

namespace wh::sharded {
namespace {

constexpr int64_t kFloat = sizeof(float);

// Heads that one rank computes, of queries and of the keys they read.
struct Heads {
  int64_t q_begin, q_end, kv_begin, kv_end;

  int64_t q() const { return q_end - q_begin; }
  int64_t kv() const { return kv_end - kv_begin; }
};

Heads all_heads(const Problem& p) { return {0, p.heads_q, 0, p.heads_kv}; }

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

// Tokens side by side in memory, the first of them `tokens.begin`.
struct Block {
  TokenRange tokens;
  TensorAt tensor;

  TensorAt at(int64_t batch_idx, int64_t head, int64_t token) const {
    return tensor.at(batch_idx, head, token - tokens.begin);
  }
};
struct KeyBlock {
  Block k, v;
};

class Builder {
 public:
  Builder(const ShardedProblem& s, int32_t rank)
      : s_(s), p_(s.whole), rank_(rank), groups_(key_groups(s)) {
    const LocalStrides& strides = s.strides[static_cast<size_t>(rank)];
    const auto bytes_q = static_cast<int64_t>(dtype_bytes(p_.dtype_q));
    const auto bytes_kv = static_cast<int64_t>(dtype_bytes(p_.dtype_kv));
    q_ = {{kQ, 0}, strides.q, bytes_q};
    k_ = {{kK, 0}, strides.k, bytes_kv};
    v_ = {{p_.values_in_keys ? kK : kV, 0}, p_.values_in_keys ? strides.k : strides.v, bytes_kv};
    out_ = {{kOut, 0}, strides.out, bytes_q};
    lse_ = lse_tensor({kLogSumExp, 0}, p_.heads_q, s.local_len_q(rank));
  }

  Schedule ring() {
    begin_sum();
    const bool sends = has_peer([&](int32_t peer) { return !wanted(peer, rank_).empty(); });
    const auto packed = sends ? pack_keys() : std::vector<KeyBlock>{};
    // Two of them: one is worked on while the other arrives.
    std::array<std::array<TensorAt, 2>, 2> slots{};
    int64_t most = 0;
    for_each_peer([&](int32_t peer) { most = std::max(most, count(wanted(rank_, peer))); });
    for (int32_t i = 0; i < std::min(2, s_.ranks() - 1) && most > 0; ++i) {
      slots[static_cast<size_t>(i)] = {token_major(most, p_.heads_kv, p_.dim_qk, k_.element_bytes),
                                       value_buffer(most, p_.heads_kv)};
    }
    const auto rotate = [&](int32_t distance) {
      const int32_t from = (rank_ - distance + s_.ranks()) % s_.ranks();
      const int32_t to = (rank_ + distance) % s_.ranks();
      std::vector<Message> messages;
      const auto& slot = slots[static_cast<size_t>((distance - 1) % 2)];
      for (const KeyBlock& block : blocks_in(wanted(rank_, from), slot[0], slot[1])) {
        exchange_keys(messages, from, false, block, block.k.tokens);
      }
      const Tokens sent = wanted(to, rank_);
      for (const TokenRange& range : sent) {
        exchange_keys(messages, to, true, block_with(packed, range), range);
      }
      start(distance, std::move(messages));
    };
    if (s_.ranks() > 1) rotate(1);
    for (const KeyBlock& block : local_keys()) attend_to(block);
    for (int32_t distance = 1; distance < s_.ranks(); ++distance) {
      finish(distance);
      if (distance + 1 < s_.ranks()) rotate(distance + 1);
      const int32_t from = (rank_ - distance + s_.ranks()) % s_.ranks();
      const auto& slot = slots[static_cast<size_t>((distance - 1) % 2)];
      for (const KeyBlock& block : blocks_in(wanted(rank_, from), slot[0], slot[1])) {
        attend_to(block);
      }
    }
    end_sum();
    return std::move(schedule_);
  }

  Schedule gather() {
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
    return std::move(schedule_);
  }

  Schedule heads(const std::vector<Heads>& shares) {
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
    return std::move(schedule_);
  }

  Schedule queries() {
    begin_sum();
    const bool sends = has_peer([&](int32_t peer) { return !asking(rank_, peer).empty(); });
    const auto packed = sends ? pack_queries() : local_queries();
    std::vector<Message> messages;
    std::vector<std::vector<Block>> asked(s_.q.size());  // of each peer
    for_each_peer([&](int32_t peer) {
      for (const TokenRange& range : asking(peer, rank_)) {
        const Block block{range,
                          token_major(range.size(), p_.heads_q, p_.dim_qk, q_.element_bytes)};
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
    return std::move(schedule_);
  }

 private:
  const Tokens& tokens_q(int32_t rank) const { return s_.q[static_cast<size_t>(rank)]; }
  const Tokens& tokens_k(int32_t rank) const { return s_.k[static_cast<size_t>(rank)]; }

  template <typename Visit>
  void for_each_rank(const Visit& visit) const {
    for (int32_t peer = 0; peer < s_.ranks(); ++peer) visit(peer);
  }
  template <typename Visit>
  void for_each_peer(const Visit& visit) const {
    for_each_rank([&](int32_t peer) {
      if (peer != rank_) visit(peer);
    });
  }
  template <typename Is>
  bool has_peer(const Is& is) const {
    bool has = false;
    for_each_peer([&](int32_t peer) { has = has || is(peer); });
    return has;
  }

  // What the queries of rank `to` see of each range of keys of rank `from`: what a window leaves.
  Tokens wanted(int32_t to, int32_t from) const {
    Tokens ranges;
    for (const TokenRange& k : tokens_k(from)) {
      TokenRange seen;
      for (const TokenRange& q : tokens_q(to)) seen = hull(seen, seen_keys(s_, q, k));
      if (!seen.empty()) ranges.push_back(seen);
    }
    return ranges;
  }
  // The queries of rank `of` that see keys of rank `to`.
  Tokens asking(int32_t of, int32_t to) const {
    Tokens ranges;
    for (const TokenRange& q : tokens_q(of)) {
      TokenRange seeing;
      for (const TokenRange& k : tokens_k(to)) seeing = hull(seeing, seeing_queries(s_, q, k));
      if (!seeing.empty()) ranges.push_back(seeing);
    }
    return ranges;
  }

  Place buffer(int64_t bytes) {
    schedule_.buffers.push_back(bytes);
    return {static_cast<int32_t>(schedule_.buffers.size()) - 1, 0};
  }
  // A range of tokens of it is one piece of memory, which a message may be.
  Strides token_major_strides(int64_t heads, int64_t dim) const {
    return {heads * dim, dim, p_.batch * heads * dim, 1};
  }
  TensorAt token_major(int64_t tokens, int64_t heads, int64_t dim, int64_t element_bytes) {
    return {buffer(tokens * p_.batch * heads * dim * element_bytes),
            token_major_strides(heads, dim), element_bytes};
  }
  TensorAt value_buffer(int64_t tokens, int64_t heads) {
    if (p_.values_in_keys) return {};
    return token_major(tokens, heads, p_.dim_v, v_.element_bytes);
  }
  static TensorAt lse_tensor(Place place, int64_t heads, int64_t length) {
    return {place, {heads * length, length, 1, 1}, kFloat};
  }
  bool is_token_major(const TensorAt& tensor, int64_t heads, int64_t dim) const {
    const Strides want = token_major_strides(heads, dim);
    return (p_.batch == 1 || tensor.strides[0] == want[0]) &&
           (heads == 1 || tensor.strides[1] == want[1]) && tensor.strides[2] == want[2] &&
           (dim == 1 || tensor.strides[3] == 1);
  }

  Block local_block(const TensorAt& tensor) const { return {{0, s_.local_len_q(rank_)}, tensor}; }
  std::vector<Block> blocks_of(const Tokens& tokens, const TensorAt& tensor) const {
    std::vector<Block> blocks;
    int64_t first = 0;
    for (const TokenRange& range : tokens) {
      blocks.push_back({range, tensor.at(0, 0, first)});
      first += range.size();
    }
    return blocks;
  }
  std::vector<KeyBlock> blocks_in(const Tokens& tokens, const TensorAt& k,
                                  const TensorAt& v) const {
    const auto of_k = blocks_of(tokens, k), of_v = blocks_of(tokens, v);
    std::vector<KeyBlock> blocks;
    for (size_t i = 0; i < of_k.size(); ++i) {
      blocks.push_back({of_k[i], p_.values_in_keys ? of_k[i] : of_v[i]});
    }
    return blocks;
  }
  std::vector<KeyBlock> local_keys() const { return blocks_in(tokens_k(rank_), k_, v_); }
  std::vector<Block> local_queries() const { return blocks_of(tokens_q(rank_), q_); }

  // Where it is not yet, token by token.
  TensorAt packed(const TensorAt& tensor, int64_t tokens, int64_t heads, int64_t dim) {
    if (is_token_major(tensor, heads, dim)) return tensor;
    const TensorAt copy = token_major(tokens, heads, dim, tensor.element_bytes);
    if (tokens > 0) schedule_.steps.push_back(Copy{tensor, copy, {p_.batch, heads, tokens, dim}});
    return copy;
  }
  std::vector<KeyBlock> pack_keys() {
    const int64_t tokens = s_.local_len_k(rank_);
    const TensorAt k = packed(k_, tokens, p_.heads_kv, p_.dim_qk);
    const TensorAt v = p_.values_in_keys ? k : packed(v_, tokens, p_.heads_kv, p_.dim_v);
    return blocks_in(tokens_k(rank_), k, v);
  }
  std::vector<Block> pack_queries() {
    return blocks_of(tokens_q(rank_), packed(q_, s_.local_len_q(rank_), p_.heads_q, p_.dim_qk));
  }
  void copy_tokens(const Block& from, const Block& to, TokenRange range, int64_t heads,
                   int64_t dim) {
    schedule_.steps.push_back(Copy{from.at(0, 0, range.begin),
                                   to.at(0, 0, range.begin),
                                   {p_.batch, heads, range.size(), dim}});
  }

  static const TokenRange& tokens_of(const Block& block) { return block.tokens; }
  static const TokenRange& tokens_of(const KeyBlock& block) { return block.k.tokens; }
  template <typename AnyBlock>
  static const AnyBlock& block_with(const std::vector<AnyBlock>& blocks, TokenRange range) {
    for (const AnyBlock& block : blocks) {
      if (tokens_of(block).begin <= range.begin && range.end <= tokens_of(block).end) return block;
    }
    return blocks.front();  // never: ranges come out of these blocks
  }

  void exchange(std::vector<Message>& messages, int32_t peer, bool is_send, const Block& block,
                TokenRange range) const {
    messages.push_back({peer, is_send, block.at(0, 0, range.begin).place,
                        range.size() * block.tensor.strides[2] * block.tensor.element_bytes});
  }
  void exchange_keys(std::vector<Message>& messages, int32_t peer, bool is_send,
                     const KeyBlock& block, TokenRange range) const {
    exchange(messages, peer, is_send, block.k, range);
    if (!p_.values_in_keys) exchange(messages, peer, is_send, block.v, range);
  }
  // One message: of a decode most of the time is theirs.
  void exchange_part(std::vector<Message>& messages, int32_t peer, bool is_send,
                     const KeyGroup& group, const View& view, const Part& part) const {
    const int64_t rows = (group.batch_end - group.batch_begin) * p_.heads_q * view.q.size();
    messages.push_back({peer, is_send, part.out.place, rows * (p_.dim_v + 1) * kFloat});
  }
  void start(int32_t exchange, std::vector<Message> messages) {
    schedule_.steps.push_back(Start{exchange, std::move(messages)});
  }
  void finish(int32_t exchange) { schedule_.steps.push_back(Finish{exchange}); }

  // Every part of the batch and of the keys that some of the queries see.
  template <typename Visit>
  void each_view(TokenRange q, const Tokens& keys, const Visit& visit) const {
    for (const TokenRange& k : keys) {
      for (const KeyGroup& group : groups_) {
        const View view = view_of(p_, group.present, q, k);
        if (!view.empty()) visit(group, view);
      }
    }
  }

  // `out` and `log_sum_exp` are those of the view's rows.
  void attend(const KeyGroup& group, const View& view, const Block& q, const KeyBlock& keys,
              const TensorAt& out, const TensorAt& log_sum_exp, const Heads& heads, bool is_part) {
    Attend step;
    Problem& p = step.problem;
    p = p_;
    p.batch = group.batch_end - group.batch_begin;
    p.heads_q = heads.q();
    p.heads_kv = heads.kv();
    p.len_q = view.q.size();
    p.len_k = view.k.size();
    p.has_key_lengths = p.has_key_starts = false;
    p.causal = view.window_right == 0 ? Causal::kBottomRight : Causal::kNone;
    p.window_left = view.window_left;
    p.window_right = view.window_right == 0 ? kUnlimited : view.window_right;
    p.f32_out = is_part && p_.dtype_q != Dtype::kF32;
    p.has_sinks = p_.has_sinks && !is_part;
    p.wants_log_sum_exp = is_part || p_.wants_log_sum_exp;
    p.stride_q = q.tensor.strides;
    p.stride_k = keys.k.tensor.strides;
    p.stride_v = keys.v.tensor.strides;
    p.stride_out = out.strides;
    if (p.len_k == 0) p.mask = MaskKind::kNone;
    p = canonical(p);
    const int64_t b = group.batch_begin;
    step.q = q.at(b, 0, view.q.begin).place;
    if (p.len_k > 0) {
      step.k = keys.k.at(b, 0, view.k.begin).place;
      step.v = keys.v.at(b, 0, view.k.begin).place;
    }
    step.out = out.place;
    if (p.wants_log_sum_exp) step.log_sum_exp = log_sum_exp.place;
    if (p.has_sinks) step.sinks = {kSinks, heads.q_begin * kFloat};
    if (p.mask != MaskKind::kNone) {
      const Strides& m = p_.stride_mask;
      step.mask = {kMask,
                   (b * m[0] + heads.q_begin * m[1] + view.q.begin * m[2] + view.k.begin * m[3]) *
                       mask_element_bytes(p_)};
    }
    schedule_.steps.push_back(std::move(step));
  }

  // Of out, and behind it the log-sum-exps.
  Part partial_buffers(const KeyGroup& group, const View& view) {
    const int64_t batch = group.batch_end - group.batch_begin, rows = view.q.size();
    const int64_t all = batch * p_.heads_q * rows;
    const Place out = buffer(all * (p_.dim_v + 1) * kFloat);
    const Place log_sum_exp{out.where, out.offset_bytes + all * p_.dim_v * kFloat};
    return {{out, dense_strides(p_.heads_q, rows, p_.dim_v), kFloat},
            lse_tensor(log_sum_exp, p_.heads_q, rows),
            Dtype::kF32};
  }

  // All rows of this rank's queries, merged in f32 as parts come.
  void begin_sum() {
    const int64_t rows = s_.local_len_q(rank_);
    sum_ = {token_major(rows, p_.heads_q, p_.dim_v, kFloat),
            lse_tensor(buffer(p_.batch * p_.heads_q * rows * kFloat), p_.heads_q, rows),
            Dtype::kF32};
    // Each row may be seen by no part at all: no keys make it an empty one.
    const TokenRange all{0, rows};
    if (rows == 0 || p_.batch == 0) return;
    attend({0, p_.batch, {}}, {all, {}}, {all, q_}, {}, sum_.out, sum_.log_sum_exp, all_heads(p_),
           true);
    scratch_ = {buffer(0), buffer(0)};
  }
  void attend_to(const KeyBlock& keys) {
    for (const Block& q : local_queries()) {
      each_view(q.tokens, {keys.k.tokens}, [&](const KeyGroup& group, const View& view) {
        const int64_t batch = group.batch_end - group.batch_begin, rows = view.q.size();
        const int64_t all = batch * p_.heads_q * rows;
        grow(scratch_[0], all * p_.dim_v * kFloat);
        grow(scratch_[1], all * kFloat);
        const Part part{{scratch_[0], dense_strides(p_.heads_q, rows, p_.dim_v), kFloat},
                        lse_tensor(scratch_[1], p_.heads_q, rows),
                        Dtype::kF32};
        attend(group, view, q, keys, part.out, part.log_sum_exp, all_heads(p_), true);
        add_part(group, view, part);
      });
    }
  }
  void grow(Place place, int64_t bytes) {
    int64_t& have = schedule_.buffers[static_cast<size_t>(place.where)];
    have = std::max(have, bytes);
  }
  void add_part(const KeyGroup& group, const View& view, const Part& part) {
    int64_t first = 0;
    for (const TokenRange& q : tokens_q(rank_)) {
      if (q.begin <= view.q.begin && view.q.end <= q.end) break;
      first += q.size();
    }
    for (const TokenRange& q : tokens_q(rank_)) {
      if (q.begin <= view.q.begin && view.q.end <= q.end) first += view.q.begin - q.begin;
    }
    const int64_t b = group.batch_begin;
    const Part rows{sum_.out.at(b, 0, first), sum_.log_sum_exp.at(b, 0, first), Dtype::kF32};
    schedule_.steps.push_back(
        Merge{{group.batch_end - b, p_.heads_q, view.q.size(), p_.dim_v}, rows, {}, {rows, part}});
  }
  void end_sum() {
    const int64_t rows = s_.local_len_q(rank_);
    if (rows == 0 || p_.batch == 0) return;
    const Part merged{out_, p_.wants_log_sum_exp ? lse_ : TensorAt{}, p_.dtype_q};
    schedule_.steps.push_back(Merge{{p_.batch, p_.heads_q, rows, p_.dim_v},
                                    merged,
                                    p_.has_sinks ? Place{kSinks, 0} : Place{},
                                    {sum_}});
  }

  // Rows with all their keys at hand: out and log-sum-exp at once, those that see nothing too.
  void finish_rows(const Block& q, const KeyBlock& keys, const Block& out, const Block& lse,
                   const Heads& heads) {
    for (const KeyGroup& group : groups_) {
      const View seen = view_of(p_, group.present, q.tokens, keys.k.tokens);
      std::vector<View> views;
      if (seen.empty()) {
        views.push_back({q.tokens, {}});
      } else {
        views = {{{q.tokens.begin, seen.q.begin}, {}}, seen, {{seen.q.end, q.tokens.end}, {}}};
      }
      const int64_t batch = group.batch_end - group.batch_begin;
      for (const View& view : views) {
        if (view.q.empty()) continue;
        TensorAt dense;
        if (p_.wants_log_sum_exp) {
          dense = lse_tensor(buffer(batch * heads.q() * view.q.size() * kFloat), heads.q(),
                             view.q.size());
        }
        attend(group, view, q, keys, out.at(group.batch_begin, 0, view.q.begin), dense, heads,
               false);
        if (!p_.wants_log_sum_exp) continue;
        schedule_.steps.push_back(Copy{dense,
                                       lse.at(group.batch_begin, 0, view.q.begin),
                                       {batch, heads.q(), view.q.size(), 1}});
      }
    }
  }

  const ShardedProblem& s_;
  const Problem& p_;
  int32_t rank_;
  std::vector<KeyGroup> groups_;
  TensorAt q_, k_, v_, out_, lse_;
  Part sum_{};
  std::array<Place, 2> scratch_{};
  Schedule schedule_;
};

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
