#include "core/sequence.h"

#include <algorithm>

namespace wh {

Sequence sequence_of_row(const Problem& p, const Tensors& t, const QueryRow& row) {
  if (p.query_layout == QueryLayout::kDense) return sequence_at(p, t, row.query_batch);
  // The last one that begins there or before: those in front of it that do have no queries.
  const int32_t* next =
      std::upper_bound(t.query_offsets, t.query_offsets + p.batch + 1, row.query_idx);
  return sequence_at(p, t, next - t.query_offsets - 1);
}

}  // namespace wh
