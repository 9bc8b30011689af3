#include "measure/useful_work.h"

#include "core/sequence.h"
#include "plan/work.h"

namespace wh::cli {
namespace {

// Whether plan/work.h knows as much: what sequences have of their own is data, not shape.
bool is_shape_alone(const Problem& p) {
  return p.is_dense() && !p.has_key_lengths && !p.has_key_starts;
}

// Calls visit(sequence) for each.
template <typename Visit>
void for_each_sequence(const Request& request, Visit&& visit) {
  const Problem& p = request.problem;
  const auto lengths = per_batch(request.key_lengths, p.batch);
  const auto starts = per_batch(request.key_starts, p.batch);
  Tensors tensors;
  if (p.has_key_lengths) tensors.key_lengths = lengths.data();
  if (p.has_key_starts) tensors.key_starts = starts.data();
  tensors.query_offsets = request.query_offsets.data();
  tensors.key_offsets = request.key_offsets.data();
  for (int64_t b = 0; b < p.batch; ++b) visit(sequence_at(p, tensors, b));
}

}  // namespace

double useful_flops(const Request& request) {
  const Problem& p = request.problem;
  if (is_shape_alone(p)) return wh::useful_flops(p);
  double pairs = 0;
  for_each_sequence(request, [&](const Sequence& sequence) {
    for (int64_t i = 0; i < sequence.len_q; ++i) {
      pairs += static_cast<double>(visible_keys(p, sequence, i).size());
    }
  });
  return pairs * static_cast<double>(p.heads_q) * flops_a_pair(p);
}

double kv_bytes(const Request& request) {
  const Problem& p = request.problem;
  if (is_shape_alone(p)) return wh::kv_bytes(p);
  double keys = 0;
  for_each_sequence(request, [&](const Sequence& sequence) {
    keys += static_cast<double>(sequence.present.size());
  });
  return keys * static_cast<double>(p.heads_kv) * kv_bytes_a_key(p);
}

}  // namespace wh::cli
