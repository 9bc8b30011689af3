#include "plan/work.h"

#include <algorithm>

#include "core/quantised.h"
#include "core/score_rules.h"

namespace wh {
namespace {

// Sum over i in [0, count) of clamp(first + i, 0, limit), in closed form: planning must not cost
// a loop over a million queries.
double clamped_ramp_sum(double first, double count, double limit) {
  const double rise_begin = std::clamp(-first, 0.0, count);
  const double rise_end = std::clamp(limit - first, rise_begin, count);
  const double rising = rise_end - rise_begin;
  return rising * (first + rise_begin) + rising * (rising - 1) / 2 + (count - rise_end) * limit;
}

}  // namespace

double visible_pairs(const Problem& p) {
  const double len_q = static_cast<double>(p.len_q);
  const double len_k = static_cast<double>(p.len_k);
  const double offset = p.causal == Causal::kTopLeft ? 0 : len_k - len_q;
  const auto right = static_cast<double>(keys_right_of_diagonal(p));
  double pairs =
      right == kUnlimited ? len_q * len_k : clamped_ramp_sum(offset + right + 1, len_q, len_k);
  if (p.window_left != kUnlimited) {
    pairs -= clamped_ramp_sum(offset - static_cast<double>(p.window_left), len_q, len_k);
  }
  return std::max(0.0, pairs);
}

int64_t most_visible_keys(const Problem& p, int64_t queries) {
  const int64_t right = keys_right_of_diagonal(p);
  if (p.window_left == kUnlimited || right == kUnlimited) return p.len_k;
  return std::min(p.len_k, p.window_left + right + std::max<int64_t>(1, queries));
}

int64_t most_visible_keys(const Problem& p) { return most_visible_keys(p, p.len_q); }

double flops_a_pair(const Problem& p) {
  const int64_t dims = p.pass == Pass::kForward ? p.dim_qk + p.dim_v : 3 * p.dim_qk + 2 * p.dim_v;
  return 2 * static_cast<double>(dims);
}

double sequences(const Problem& p) {
  const auto batch = static_cast<double>(p.batch);
  if (p.query_layout == QueryLayout::kDense || p.len_q == 0) return batch;
  return std::min(batch, static_cast<double>(p.total_q) / static_cast<double>(p.len_q));
}

double mean_key_share(const Problem& p) {
  const auto most = static_cast<double>(p.batch * p.len_k);
  if (p.key_layout == KeyLayout::kDense || most == 0) return 1;
  const auto room =
      static_cast<double>(p.key_layout == KeyLayout::kPacked ? p.total_k : p.pages * p.page_size);
  return std::min(1.0, room / most);
}

double useful_flops(const Problem& p) {
  return visible_pairs(p) * sequences(p) * static_cast<double>(p.heads_q) * flops_a_pair(p);
}

double kv_bytes_a_key(const Problem& p) {
  const auto bytes = [&](Quantised format, Scales scales, int64_t dim) {
    return stored_bytes(format, p.dtype_kv, dim) + (scales == Scales::kTokenHead ? 4 : 0);
  };
  int64_t sum = bytes(p.quantised_k, p.scales_k, p.dim_qk);
  if (!p.values_in_keys) sum += bytes(p.quantised_v, p.scales_v, p.dim_v);
  return static_cast<double>(sum);
}

double kv_bytes(const Problem& p) {
  const double keys = static_cast<double>(p.batch * p.len_k) * mean_key_share(p);
  return static_cast<double>(p.heads_kv) * keys * kv_bytes_a_key(p);
}

}  // namespace wh
