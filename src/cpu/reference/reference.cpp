#include "cpu/reference/reference.h"

#include <cmath>
#include <limits>

#include "core/array_mask.h"
#include "core/element.h"
#include "core/key_rows.h"
#include "core/kv_tensor.h"
#include "core/score_rules.h"
#include "cpu/reference/row.h"

namespace wh::cpu {

double score_row(const Problem& p, const Tensors& t, const Row& row, KeyRange keys,
                 const ScoredRow& scored) {
  const int64_t q = row.offset(p.stride_q);
  const KeyRows key_rows = wh::key_rows(p, t, row.sequence);
  const KvTensor stored = keys_of(p, t);
  double largest = -std::numeric_limits<double>::infinity();
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    const float bias = mask_bias(p, t.mask, row.sequence.batch_idx, row.head_q, row.query_idx, j);
    double& score = scored.scores[j - keys.begin];
    double& is_visible = scored.is_visible[j - keys.begin];
    is_visible = bias != -std::numeric_limits<float>::infinity();
    if (is_visible == 0) continue;
    const KvPlace place = place_of(key_rows, row.sequence, row.head_kv, j);
    double dot = 0;
    for (int64_t d = 0; d < p.dim_qk; ++d) {
      dot += double{load_element(t.q, p.dtype_q, q + d * p.stride_q[3])} * stored.element(place, d);
    }
    score = dot * p.scale;
    double slope = 1;
    if (p.softcap > 0) {
      const double capped = std::tanh(score / p.softcap);
      slope = 1 - capped * capped;
      score = p.softcap * capped;
    }
    if (scored.slopes != nullptr) scored.slopes[j - keys.begin] = slope;
    score += bias;
    if (std::isnan(score) || score > largest) largest = score;
    if (std::isnan(largest)) largest = std::numeric_limits<double>::quiet_NaN();
  }
  const double sink = sink_of(p, t, row);
  if (!(sink <= largest) && !std::isnan(largest)) largest = sink;
  return std::isinf(largest) && largest < 0 ? 0 : largest;
}

namespace {

void reference_row(const Problem& p, const Tensors& t, const Row& row, int64_t row_idx,
                   double* scratch) {
  double* scores = scratch;
  double* is_visible = scores + p.len_k;
  double* sums = is_visible + p.len_k;  // [dim_v]
  const KeyRange keys = visible_keys(p, row.sequence, row.query_idx);
  const KeyRows key_rows = wh::key_rows(p, t, row.sequence);
  const double shift = score_row(p, t, row, keys, {scores, is_visible, nullptr});

  const KvTensor values = values_of(p, t);
  double denominator = std::exp(sink_of(p, t, row) - shift);
  for (int64_t d = 0; d < p.dim_v; ++d) sums[d] = 0;
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    if (is_visible[j - keys.begin] == 0) continue;
    const double weight = std::exp(scores[j - keys.begin] - shift);
    denominator += weight;
    const KvPlace place = place_of(key_rows, row.sequence, row.head_kv, j);
    for (int64_t d = 0; d < p.dim_v; ++d) sums[d] += weight * values.element(place, d);
  }
  const bool is_empty = is_empty_row(denominator);
  const int64_t out = row.offset(p.stride_out);
  for (int64_t d = 0; d < p.dim_v; ++d) {
    store_element(t.out, p.dtype_out(), out + d * p.stride_out[3],
                  static_cast<float>(is_empty ? kEmptyRowOut : sums[d] / denominator));
  }
  if (p.wants_log_sum_exp) {
    t.log_sum_exp[row_idx] =
        is_empty ? kEmptyRowLogSumExp : static_cast<float>(shift + std::log(denominator));
  }
}

}  // namespace

size_t reference_workspace_bytes(const Problem& problem) {
  return sizeof(double) * static_cast<size_t>(2 * problem.len_k + problem.dim_v);
}

void reference_rows(const Problem& p, const Tensors& t, int64_t begin, int64_t end,
                    double* scratch) {
  for (int64_t row_idx = begin; row_idx < end; ++row_idx) {
    const QueryRow at = query_row(p, row_idx);
    const Sequence sequence = sequence_of_row(p, t, at);
    const Row row{sequence, at.head_q, at.head_q / p.group(), at.query_idx - sequence.first_query};
    reference_row(p, t, row, row_idx, scratch);
  }
}

}  // namespace wh::cpu
