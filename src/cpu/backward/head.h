// Where a worker is: one (sequence, kv head) pair, and where its rows and keys lie in the tensors.
#pragma once

#include "core/key_rows.h"
#include "core/own_keys.h"
#include "core/problem.h"
#include "core/sequence.h"

namespace wh::cpu {

// Rows are numbered as in layout.h.
struct BackwardHead {
  Sequence sequence{};
  KeyRows key_rows{};
  int64_t head_kv = 0;
  int64_t group = 1;
  int64_t keys = 0;  // of the sequence, absent ones too

  // The idx-th of batch * heads_kv.
  static BackwardHead at(const Problem& p, const Tensors& t, int64_t idx) {
    const Sequences sequences = sequences_of(p, t);
    const Sequence sequence = sequence_at(sequences, idx / p.heads_kv);
    return {sequence, wh::key_rows(p, t, sequence), idx % p.heads_kv, p.group(),
            own_keys(sequences, sequence.batch_idx)};
  }

  int64_t rows() const { return sequence.len_q * group; }
  KeyRange present() const { return sequence.present; }
  int64_t query_of(int64_t row) const { return row / group; }  // of the sequence
  int64_t token_of(int64_t row) const { return sequence.first_query + query_of(row); }
  int64_t head_of(int64_t row) const { return head_kv * group + row % group; }
  int64_t row_offset(const Strides& stride, int64_t row) const {
    return sequence.query_batch * stride[0] + head_of(row) * stride[1] + token_of(row) * stride[2];
  }
  int64_t key_offset(const Strides& stride, int64_t key) const {
    return key_rows.offset(stride[0], stride[2], key) + head_kv * stride[1];
  }
};

}  // namespace wh::cpu
