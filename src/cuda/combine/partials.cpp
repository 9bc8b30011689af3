#include "cuda/combine/combine.h"

namespace wh::cuda {

Partials Partials::at(void* base, const Problem& p, int32_t splits) {
  Partials partials;
  partials.splits = splits;
  if (splits <= 1) return partials;
  partials.rows = p.batch * p.heads_q * p.len_q;
  partials.columns = static_cast<int32_t>((p.dim_v + 3) / 4 * 4);
  partials.sums = static_cast<float*>(base);
  partials.log_sum_exp = partials.sums + splits * partials.rows * partials.columns;
  return partials;
}

size_t Partials::bytes() const {
  return static_cast<size_t>(splits * rows * (int64_t{columns} + 1)) * sizeof(float);
}

}  // namespace wh::cuda
