// Where the sequences of a batch lie: which queries and keys each one has, and where its rows of q
// and out begin, for dense and packed tensors alike and for host and device. Every kernel asks it.
#pragma once

#include <cstdint>

#include "core/key_range.h"
#include "core/problem.h"

namespace wh {

// What decides it, as plain data that a kernel's arguments can hold. On a device nobody has looked
// at the offsets: what they say is clamped to the maxima, so that no row outside of out is written.
template <typename Int>
struct SequencesOf {
  Int len_q, len_k;              // the most of one sequence
  Int total_q, total_k;          // tokens of packed queries and keys
  const int32_t* query_offsets;  // null: queries are dense
  const int32_t* key_offsets;    // null: keys are not packed
  const int32_t* key_lengths;    // null: all keys are there
  const int32_t* key_starts;     // null: from the first on
};
using Sequences = SequencesOf<int64_t>;

template <typename Int>
struct SequenceOf {
  Int batch_idx;
  Int query_batch;  // index into q's and out's first dimension
  Int first_query;  // index of its first token there
  Int len_q;        // its own
  Int key_batch;    // index into K's first dimension, where keys are not paged
  Int first_key;    // index of its first token there
  KeyRangeOf<Int> present;

  constexpr bool has_queries() const { return len_q > 0; }
};
using Sequence = SequenceOf<int64_t>;

// [begin, begin + length) of a tensor of `total` tokens.
template <typename Int>
struct TokenRangeOf {
  Int begin, length;
};
template <typename Int>
constexpr TokenRangeOf<Int> packed_tokens(const int32_t* offsets, Int batch_idx, Int most,
                                          Int total) {
  const Int begin = clamp_to<Int>(offsets[batch_idx], 0, total);
  const Int end = clamp_to<Int>(offsets[batch_idx + 1], begin, total);
  return {begin, clamp_to<Int>(end - begin, 0, most)};
}

template <typename Int>
constexpr SequenceOf<Int> sequence_at(const SequencesOf<Int>& all, Int batch_idx) {
  SequenceOf<Int> sequence{batch_idx, batch_idx, 0, all.len_q, batch_idx, 0, {}};
  if (all.query_offsets != nullptr) {
    const auto queries = packed_tokens(all.query_offsets, batch_idx, all.len_q, all.total_q);
    sequence.query_batch = 0;
    sequence.first_query = queries.begin;
    sequence.len_q = queries.length;
  }
  Int len_k = all.len_k;
  if (all.key_offsets != nullptr) {
    const auto keys = packed_tokens(all.key_offsets, batch_idx, all.len_k, all.total_k);
    sequence.key_batch = 0;
    sequence.first_key = keys.begin;
    len_k = keys.length;
  }
  sequence.present = present_keys(len_k, all.key_lengths, all.key_starts, batch_idx);
  return sequence;
}

inline Sequences sequences_of(const Problem& p, const Tensors& t) {
  return {p.len_q,
          p.len_k,
          p.total_q,
          p.total_k,
          p.query_layout == QueryLayout::kPacked ? t.query_offsets : nullptr,
          p.key_layout == KeyLayout::kPacked ? t.key_offsets : nullptr,
          t.key_lengths,
          t.key_starts};
}
inline Sequence sequence_at(const Problem& problem, const Tensors& tensors, int64_t batch_idx) {
  return sequence_at(sequences_of(problem, tensors), batch_idx);
}

inline KeyRange visible_keys(const Problem& problem, const Sequence& sequence, int64_t query_idx) {
  return visible_keys<int64_t>(problem.causal,
                               {problem.window_left, keys_right_of_diagonal(problem)},
                               sequence.len_q, sequence.present, query_idx);
}

// The place of a row's log-sum-exp, [batch, heads_q, len_q] or, where queries are packed,
// [total_q, heads_q]; its number among all rows, too. `query_idx` is the token's in q.
template <typename Int>
constexpr int64_t row_index(QueryLayout layout, int64_t heads_q, int64_t len_q, Int query_batch,
                            Int head_q, Int query_idx) {
  return layout == QueryLayout::kPacked ? int64_t{query_idx} * heads_q + head_q
                                        : (query_batch * heads_q + head_q) * len_q + query_idx;
}

// The inverse.
struct QueryRow {
  int64_t query_batch, head_q, query_idx;
};
inline QueryRow query_row(const Problem& p, int64_t row) {
  if (p.query_layout == QueryLayout::kPacked) return {0, row % p.heads_q, row / p.heads_q};
  return {row / p.len_q / p.heads_q, row / p.len_q % p.heads_q, row % p.len_q};
}
// Rows that q has room for, and those that are some sequence's: the first ones.
inline int64_t all_query_rows(const Problem& p) {
  const Storage storage = query_storage(p);
  return storage.batch * p.heads_q * storage.length;
}
inline int64_t query_rows(const Problem& p, const Tensors& t) {
  if (p.query_layout == QueryLayout::kDense) return all_query_rows(p);
  return p.batch == 0 ? 0 : t.query_offsets[p.batch] * p.heads_q;
}
// Whose a row is: `query_row().query_idx` less its first query is the row's query there.
Sequence sequence_of_row(const Problem& problem, const Tensors& tensors, const QueryRow& row);

}  // namespace wh
