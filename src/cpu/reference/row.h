// A row's scores in float64, which both passes of the reference start from.
#pragma once

#include "core/problem.h"
#include "core/score_rules.h"
#include "core/sequence.h"

namespace wh::cpu {

struct Row {
  Sequence sequence;
  int64_t head_q, head_kv, query_idx;

  // Of q's or out's first element of the row.
  int64_t offset(const Strides& stride) const {
    return sequence.query_batch * stride[0] + head_q * stride[1] +
           (sequence.first_query + query_idx) * stride[2];
  }
};

// Of each key in the row's range.
struct ScoredRow {
  double* scores;
  double* is_visible;  // 0 or 1: an array mask may hide it
  double* slopes;      // of the softcap there; null: not wanted
};

inline double sink_of(const Problem& p, const Tensors& t, const Row& row) {
  return sink_score(p.has_sinks ? t.sinks : nullptr, row.head_q);
}

// Returns what to subtract from the scores: the largest visible one, the sink among them. NaN
// scores make it NaN, as IEEE addition would; without any score it is 0.
double score_row(const Problem& problem, const Tensors& tensors, const Row& row, KeyRange keys,
                 const ScoredRow& scored);

}  // namespace wh::cpu
