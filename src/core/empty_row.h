// The rule for a row that sees no key (or none with a weight), in one place for the kernels and the
// reference: it is 0, its log-sum-exp minus infinity.
#pragma once

#include <limits>

namespace wh {

constexpr float kEmptyRowOut = 0;
constexpr float kEmptyRowLogSumExp = -std::numeric_limits<float>::infinity();

// By the sum of the row's weights, its sink's included. NaN is not empty.
template <typename Real>
bool is_empty_row(Real sum_of_weights) {
  return sum_of_weights == 0;
}

}  // namespace wh
