#include "cuda/combine/combine.h"

namespace wh::cuda {

Partials Partials::at(void* base, const Problem& p, int32_t splits) {
  Partials partials;
  partials.splits = splits;
  if (splits <= 1) return partials;
  partials.rows = p.batch * p.heads_q * p.len_q;
  partials.columns = static_cast<int32_t>((p.dim_v + 3) / 4 * 4);
  partials.sums = static_cast<float*>(base);
  partials.weights =
      reinterpret_cast<RowWeight*>(partials.sums + splits * partials.rows * partials.columns);
  return partials;
}

size_t Partials::bytes() const {
  const auto count = static_cast<size_t>(splits * rows);
  return count * (static_cast<size_t>(columns) * sizeof(float) + sizeof(RowWeight));
}

}  // namespace wh::cuda
