// What all strategies build their schedules from: buffers, messages, views that are attended to,
// and the sum of partial states.
#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "parallel/schedule.h"
#include "parallel/shards.h"
#include "parallel/view.h"
#include "plan/backend.h"

namespace wh::sharded {

constexpr int64_t kFloat = sizeof(float);

// Messages of no more than this take 4 us at 255 GB/s: no work beside them has much to hide.
// Devices wait for them first, as a kernel that fills one holds up messages that NCCL has not
// begun: two H200s that did not wait took 1.09 times as long as one for a decode of 512K keys, one
// share after the other. A host, which begins messages at once, does not: over 1 GB/s 63 of them
// take 0.3 ms.
constexpr int64_t kShortBytes = 1 << 20;

// What is merged at once. A launch takes 32 on a device.
constexpr size_t kMostMerged = 32;

// Heads that one rank computes, of queries and of the keys they read.
struct Heads {
  int64_t q_begin, q_end, kv_begin, kv_end;

  int64_t q() const { return q_end - q_begin; }
  int64_t kv() const { return kv_end - kv_begin; }
};

inline Heads all_heads(const Problem& p) { return {0, p.heads_q, 0, p.heads_kv}; }

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

// What is attended to at once: neighbours of the batch whose rows are the same and lie alike
// against the ends of their keys.
struct Piece {
  int64_t batch_begin = 0;
  View view;                     // its keys are the hull of all
  std::vector<TokenRange> keys;  // of each one of the batch; none at all too

  int64_t batch() const { return static_cast<int64_t>(keys.size()); }
  bool keys_differ() const {
    return std::any_of(keys.begin(), keys.end(), [&](TokenRange k) { return k != view.k; });
  }
};
inline Piece piece_of(const KeyGroup& group, const View& view) {
  const auto batch = static_cast<size_t>(group.batch_end - group.batch_begin);
  return {group.batch_begin, view, std::vector<TokenRange>(batch, view.k)};
}

// Parts of the same rows, by batch entries and queries.
struct PieceParts {
  Piece piece;
  std::vector<Part> parts;
};
using PartsByRows = std::map<std::array<int64_t, 4>, PieceParts>;

inline void add_to(PartsByRows& all, const Piece& piece, const Part& part) {
  const TokenRange& q = piece.view.q;
  PieceParts& same = all[{piece.batch_begin, piece.batch(), q.begin, q.end}];
  same.piece = piece;
  same.parts.push_back(part);
}

// Lists what one rank does, step by step. A strategy is one function, in a file of its name; it
// builds one schedule, which takes what the builder has gathered.
class Builder {
 public:
  Builder(const ShardedProblem& s, int32_t rank)
      : s_(s), p_(s.whole), rank_(rank), groups_(key_groups(s)) {
    const LocalLayout& layout = s.layouts[static_cast<size_t>(rank)];
    const auto bytes_q = static_cast<int64_t>(dtype_bytes(p_.dtype_q));
    const auto bytes_kv = static_cast<int64_t>(dtype_bytes(p_.dtype_kv));
    q_ = {{kQ, 0}, layout.q, bytes_q};
    k_ = {{kK, 0}, layout.k, bytes_kv};
    v_ = {{p_.values_in_keys ? kK : kV, 0}, p_.values_in_keys ? layout.k : layout.v, bytes_kv};
    out_ = {{kOut, 0}, layout.out, bytes_q};
    lse_ = lse_tensor({kLogSumExp, 0}, p_.heads_q, s.local_len_q(rank));
  }

  Schedule ring();
  Schedule gather();
  Schedule heads(const std::vector<Heads>& shares);
  Schedule queries();

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

  // Of each of `ranges` the hull of what `touch` says the others reach of it.
  template <typename Touch>
  static Tokens touched(const Tokens& ranges, const Tokens& others, const Touch& touch) {
    Tokens parts;
    for (const TokenRange& range : ranges) {
      TokenRange part;
      for (const TokenRange& other : others) part = hull(part, touch(range, other));
      if (!part.empty()) parts.push_back(part);
    }
    return parts;
  }

  // What the queries of rank `to` see of each range of keys of rank `from`: what a window leaves.
  Tokens wanted(int32_t to, int32_t from) const {
    return touched(tokens_k(from), tokens_q(to),
                   [&](const TokenRange& k, const TokenRange& q) { return seen_keys(s_, q, k); });
  }
  // The queries of rank `of` that see keys of rank `to`.
  Tokens asking(int32_t of, int32_t to) const {
    return touched(tokens_q(of), tokens_k(to), [&](const TokenRange& q, const TokenRange& k) {
      return seeing_queries(s_, q, k);
    });
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
  void exchange_part(std::vector<Message>& messages, int32_t peer, bool is_send, const Piece& piece,
                     const Part& part) const {
    const int64_t rows = piece.batch() * p_.heads_q * piece.view.q.size();
    messages.push_back({peer, is_send, part.out.place, rows * (p_.dim_v + 1) * kFloat});
  }
  void start(int32_t exchange, std::vector<Message> messages) {
    schedule_.steps.push_back(Start{exchange, std::move(messages)});
  }
  bool are_waited_for(const std::vector<Message>& messages) const {
    int64_t bytes = 0;
    for (const Message& message : messages) bytes += message.bytes;
    return !backend(p_.device).is_host() && bytes <= kShortBytes;
  }
  void finish(int32_t exchange) { schedule_.steps.push_back(Finish{exchange}); }

  // Every part of the batch and of the keys that some of the queries see. Of a batch of lengths of
  // their own that is one piece for all that end beyond the keys or are decoded, not one each.
  template <typename Visit>
  void each_piece(TokenRange q, const Tokens& keys, const Visit& visit) const {
    for (const TokenRange& k : keys) {
      Piece open;
      const auto close = [&] {
        while (!open.keys.empty() && open.keys.back().empty()) open.keys.pop_back();
        if (!open.keys.empty()) visit(open);
        open.keys.clear();
      };
      for (const KeyGroup& group : groups_) {
        const View view = view_of(p_, group.present, q, k);
        const bool fits =
            view.empty() || (view.q == open.view.q && view.window_left == open.view.window_left &&
                             view.window_right == open.view.window_right);
        if (open.keys.empty() || !fits) {
          close();
          if (!view.empty()) open = piece_of(group, view);
          continue;
        }
        const TokenRange its_keys = view.empty() ? TokenRange{} : view.k;
        open.keys.insert(open.keys.end(), static_cast<size_t>(group.batch_end - group.batch_begin),
                         its_keys);
        open.view.k = hull(open.view.k, its_keys);
      }
      close();
    }
  }

  // `out` and `log_sum_exp` are those of the view's rows.
  void attend(const Piece& piece, const Block& q, const KeyBlock& keys, const TensorAt& out,
              const TensorAt& log_sum_exp, const Heads& heads, bool is_part) {
    const View& view = piece.view;
    Attend step;
    Problem& p = step.problem;
    p = p_;
    p.batch = piece.batch();
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
    if (p.len_k == 0) {
      p.mask = MaskKind::kNone;
      p = with_dense_keys(p);
    }
    const int64_t b = piece.batch_begin;
    int64_t first_key = view.k.begin;
    step.q = q.at(b, 0, view.q.begin).place;
    const bool is_paged = p.key_layout == KeyLayout::kPaged;
    if (is_paged) {
      first_key -= take_pages(step, b, view.k);
    } else if (p.len_k > 0) {
      step.k = keys.k.at(b, 0, view.k.begin).place;
      step.v = keys.v.at(b, 0, view.k.begin).place;
    }
    if (is_paged || piece.keys_differ()) say_which_keys(step, piece, first_key);
    p = canonical(p);
    step.out = out.place;
    if (p.wants_log_sum_exp) step.log_sum_exp = log_sum_exp.place;
    if (p.has_sinks) step.sinks = {kSinks, heads.q_begin * kFloat};
    if (p.mask != MaskKind::kNone) {
      const Strides& m = p_.stride_mask;
      step.mask = {kMask,
                   (b * m[0] + heads.q_begin * m[1] + view.q.begin * m[2] + first_key * m[3]) *
                       mask_element_bytes(p_)};
    }
    schedule_.steps.push_back(std::move(step));
  }

  // Keys of this rank's own pages, from the page of the first one on. The answer: how many of that
  // page lie before it.
  int64_t take_pages(Attend& step, int64_t batch_begin, TokenRange keys) {
    Problem& p = step.problem;
    const LocalLayout& layout = s_.layouts[static_cast<size_t>(rank_)];
    const int64_t first = index_in(tokens_k(rank_), keys);
    const int64_t page = first / p.page_size, before = first % p.page_size;
    p.len_k = before + keys.size();
    p.pages = layout.pages;
    p.stride_page_table = layout.stride_page_table;
    step.k = k_.place;
    step.v = v_.place;
    step.page_table = {kPageTable, (batch_begin * layout.stride_page_table + page) *
                                       static_cast<int64_t>(sizeof(int32_t))};
    return before;
  }
  // Which keys each one of the batch has, from `first` on.
  void say_which_keys(Attend& step, const Piece& piece, int64_t first) {
    std::vector<int32_t> lengths, starts;
    for (const TokenRange& keys : piece.keys) {
      lengths.push_back(keys.empty() ? 0 : static_cast<int32_t>(keys.end - first));
      starts.push_back(keys.empty() ? 0 : static_cast<int32_t>(keys.begin - first));
    }
    step.problem.has_key_lengths = true;
    step.key_lengths = numbers(lengths);
    if (std::all_of(starts.begin(), starts.end(), [](int32_t start) { return start == 0; })) return;
    step.problem.has_key_starts = true;
    step.key_starts = numbers(starts);
  }
  // All of them are written at once, by the first step.
  Place numbers(const std::vector<int32_t>& more) {
    if (!numbers_) numbers_ = Write{buffer(0), {}};
    std::vector<int32_t>& all = numbers_->numbers;
    Place place = numbers_->to;
    place.offset_bytes = static_cast<int64_t>(all.size() * sizeof(int32_t));
    all.insert(all.end(), more.begin(), more.end());
    grow(numbers_->to, static_cast<int64_t>(all.size() * sizeof(int32_t)));
    return place;
  }
  Schedule finished() {
    if (numbers_) schedule_.steps.insert(schedule_.steps.begin(), std::move(*numbers_));
    return std::move(schedule_);
  }

  // Of out, and behind it the log-sum-exps.
  Part partial_buffers(const Piece& piece) {
    const int64_t rows = piece.view.q.size(), all = piece.batch() * p_.heads_q * rows;
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
    attend(piece_of({0, p_.batch, {}}, {all, {}}), {all, q_}, {}, sum_.out, sum_.log_sum_exp,
           all_heads(p_), true);
    scratch_ = {buffer(0), buffer(0)};
  }
  void attend_to(const KeyBlock& keys) {
    for (const Block& q : local_queries()) {
      each_piece(q.tokens, {keys.k.tokens}, [&](const Piece& piece) {
        const int64_t rows = piece.view.q.size(), all = piece.batch() * p_.heads_q * rows;
        grow(scratch_[0], all * p_.dim_v * kFloat);
        grow(scratch_[1], all * kFloat);
        const Part part{{scratch_[0], dense_strides(p_.heads_q, rows, p_.dim_v), kFloat},
                        lse_tensor(scratch_[1], p_.heads_q, rows),
                        Dtype::kF32};
        attend(piece, q, keys, part.out, part.log_sum_exp, all_heads(p_), true);
        add_parts({piece, {part}});
      });
    }
  }
  void grow(Place place, int64_t bytes) {
    int64_t& have = schedule_.buffers[static_cast<size_t>(place.where)];
    have = std::max(have, bytes);
  }
  // Where the first token of a part of one of the ranges lies among all of them.
  static int64_t index_in(const Tokens& tokens, TokenRange part) {
    int64_t first = 0;
    for (const TokenRange& range : tokens) {
      if (range.begin <= part.begin && part.end <= range.end)
        return first + part.begin - range.begin;
      first += range.size();
    }
    return first;  // never: parts come out of these ranges
  }
  void add_parts(const PieceParts& same) {
    const Piece& piece = same.piece;
    const TokenRange& q = piece.view.q;
    const int64_t b = piece.batch_begin, first = index_in(tokens_q(rank_), q);
    const Part rows{sum_.out.at(b, 0, first), sum_.log_sum_exp.at(b, 0, first), Dtype::kF32};
    for (size_t done = 0; done < same.parts.size();) {
      std::vector<Part> parts{rows};
      while (parts.size() < kMostMerged && done < same.parts.size()) {
        parts.push_back(same.parts[done++]);
      }
      schedule_.steps.push_back(
          Merge{{piece.batch(), p_.heads_q, q.size(), p_.dim_v}, rows, {}, std::move(parts)});
    }
  }
  // With what has not been added yet: at once where it is of all rows, as in a decode, whose merges
  // are one launch after another.
  void end_sum(const PartsByRows& last) {
    const int64_t rows = s_.local_len_q(rank_);
    if (rows == 0 || p_.batch == 0) return;
    std::vector<Part> parts{sum_};
    const auto is_of_all = [&](const PieceParts& same) {
      return same.piece.batch() == p_.batch && same.piece.view.q.size() == rows &&
             same.parts.size() < kMostMerged;
    };
    for (const auto& [key, same] : last) {
      if (last.size() == 1 && is_of_all(same)) {
        parts.insert(parts.end(), same.parts.begin(), same.parts.end());
      } else {
        add_parts(same);
      }
    }
    const Part merged{out_, p_.wants_log_sum_exp ? lse_ : TensorAt{}, p_.dtype_q};
    schedule_.steps.push_back(Merge{{p_.batch, p_.heads_q, rows, p_.dim_v},
                                    merged,
                                    p_.has_sinks ? Place{kSinks, 0} : Place{},
                                    std::move(parts)});
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
        attend(piece_of(group, view), q, keys, out.at(group.batch_begin, 0, view.q.begin), dense,
               heads, false);
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
  std::optional<Write> numbers_;
  Schedule schedule_;
};

}  // namespace wh::sharded
