#include "measure/useful_work.h"

#include "core/key_range.h"
#include "plan/work.h"

namespace wh::cli {
namespace {

bool has_every_key(const Problem& p) { return !p.has_key_lengths && !p.has_key_starts; }

// Calls visit(keys present) for each batch entry.
template <typename Visit>
void for_each_entry(const Request& request, Visit&& visit) {
  const Problem& p = request.problem;
  const auto lengths = per_batch(request.key_lengths, p.batch);
  const auto starts = per_batch(request.key_starts, p.batch);
  Tensors tensors;
  if (p.has_key_lengths) tensors.key_lengths = lengths.data();
  if (p.has_key_starts) tensors.key_starts = starts.data();
  for (int64_t b = 0; b < p.batch; ++b) visit(present_keys(p, tensors, b));
}

}  // namespace

double useful_flops(const Request& request) {
  const Problem& p = request.problem;
  if (has_every_key(p)) return wh::useful_flops(p);
  double pairs = 0;
  for_each_entry(request, [&](KeyRange present) {
    for (int64_t i = 0; i < p.len_q; ++i) {
      pairs += static_cast<double>(visible_keys(p, present, i).size());
    }
  });
  return pairs * static_cast<double>(p.heads_q) * flops_a_pair(p);
}

double kv_bytes(const Request& request) {
  const Problem& p = request.problem;
  if (has_every_key(p)) return wh::kv_bytes(p);
  double keys = 0;
  for_each_entry(request, [&](KeyRange present) { keys += static_cast<double>(present.size()); });
  return keys * static_cast<double>(p.heads_kv) * kv_bytes_a_key(p);
}

}  // namespace wh::cli
