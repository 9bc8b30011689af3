#include "core/quantised.h"

namespace wh {
namespace {

template <typename Block>
void round_blocks(const float* row, int64_t dim, void* to) {
  for (int64_t d = 0; d < dim; d += kBlockElements) {
    round_block([from = row + d](int64_t i) { return from[i]; },
                static_cast<Block*>(to)[d / kBlockElements]);
  }
}

}  // namespace

float scale_of_row(const float* row, int64_t dim, Quantised format) {
  return scale_of_largest(largest_of([row](int64_t d) { return row[d]; }, dim), format);
}

void quantise_row(const float* row, int64_t dim, Quantised format, const float* scales,
                  int64_t scale_stride, void* to) {
  const auto code = [&](int64_t d) { return unscaled(row[d], scales[d * scale_stride]); };
  switch (format) {
    case Quantised::kNone:
      break;  // has no codes
    case Quantised::kE4m3:
      for (int64_t d = 0; d < dim; ++d) static_cast<E4m3*>(to)[d] = from_float<E4m3>(code(d));
      break;
    case Quantised::kInt8:
      for (int64_t d = 0; d < dim; ++d) static_cast<Int8*>(to)[d] = from_float<Int8>(code(d));
      break;
    case Quantised::kQ8_0:
      round_blocks<Q8_0>(row, dim, to);
      break;
    case Quantised::kQ4_0:
      round_blocks<Q4_0>(row, dim, to);
      break;
  }
}

}  // namespace wh
