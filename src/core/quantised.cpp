#include "core/quantised.h"

namespace wh {
namespace {

// The element farthest from 0, with its sign; NaN where one is NaN.
float largest_of(const float* row, int64_t dim) {
  float largest = 0;
  for (int64_t d = 0; d < dim; ++d) {
    if (std::isnan(row[d])) return row[d];
    if (std::fabs(row[d]) > std::fabs(largest)) largest = row[d];
  }
  return largest;
}

float divided(float value, float scale) { return scale == 0 ? 0 : value / scale; }

// Codes are rounded by the scale that readers will have, which is f16.
Q8_0 q8_0_block(const float* from) {
  Q8_0 block{from_float<Half>(std::fabs(largest_of(from, kBlockElements)) / kHighestInt8), {}};
  const float scale = to_float(block.scale);
  for (int64_t i = 0; i < kBlockElements; ++i) {
    block.codes[i] = from_float<Int8>(divided(from[i], scale)).bits;
  }
  return block;
}

// The farthest element is -8 steps from 0, where the codes reach farther than on the other side.
Q4_0 q4_0_block(const float* from) {
  Q4_0 block{from_float<Half>(largest_of(from, kBlockElements) / -8), {}};
  const float scale = to_float(block.scale);
  const auto code = [&](float value) {
    return static_cast<uint8_t>(std::min(round_to_code(divided(value, scale), 8), 7.0f) + 8);
  };
  for (int64_t i = 0; i < kBlockElements / 2; ++i) {
    block.codes[i] = static_cast<uint8_t>(code(from[i]) | code(from[i + kBlockElements / 2]) << 4);
  }
  return block;
}

}  // namespace

float scale_of_row(const float* row, int64_t dim, Quantised format) {
  const float highest = format == Quantised::kE4m3 ? kHighestE4m3 : kHighestInt8;
  return std::fabs(largest_of(row, dim)) / highest;
}

void quantise_row(const float* row, int64_t dim, Quantised format, const float* scales,
                  int64_t scale_stride, void* to) {
  const auto code = [&](int64_t d) { return divided(row[d], scales[d * scale_stride]); };
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
      for (int64_t d = 0; d < dim; d += kBlockElements) {
        static_cast<Q8_0*>(to)[d / kBlockElements] = q8_0_block(row + d);
      }
      break;
    case Quantised::kQ4_0:
      for (int64_t d = 0; d < dim; d += kBlockElements) {
        static_cast<Q4_0*>(to)[d / kBlockElements] = q4_0_block(row + d);
      }
      break;
  }
}

}  // namespace wh
