#include "core/carver.h"
#include "core/sequence.h"
#include "cuda/combine/combine.h"

namespace wh::cuda {

namespace {

Partials carve(Carver& carver, const Problem& p, int32_t splits) {
  Partials partials;
  partials.splits = splits;
  if (splits <= 1) return partials;
  partials.rows = all_query_rows(p);
  partials.columns = static_cast<int32_t>((p.dim_v + 3) / 4 * 4);
  partials.sums = carver.take<float>(splits * partials.rows * partials.columns);
  partials.weights = carver.take<RowWeight>(splits * partials.rows);
  return partials;
}

}  // namespace

Partials Partials::at(void* base, const Problem& p, int32_t splits) {
  Carver carver(base);
  return carve(carver, p, splits);
}

size_t Partials::bytes(const Problem& p, int32_t splits) {
  Carver carver(nullptr);
  carve(carver, p, splits);
  return carver.bytes();
}

}  // namespace wh::cuda
