// What the semantics say of a score, a sink, a window and a row, for host and device code alike:
// the reference, the CPU kernels and the CUDA kernels call these. Which keys a query sees is in
// key_range.h, elements of array masks in array_mask.h and cuda/common/scores.cuh.
#pragma once

#include <cstdint>
#include <limits>

#include "core/problem.h"

namespace wh {

// A key that a row may not see, whatever its score is: an additive mask's minus infinity.
constexpr float kHidden = -std::numeric_limits<float>::infinity();

// Finite biases beyond it count as it: scaled to base 2 and added to a score of at most as much
// they stay finite. Programs mask with the lowest number of f32, which is not minus infinity: where
// all keys of a row have it, the row is the mean of V and not empty.
constexpr float kLargestBias = 0x1p126f;

constexpr float limited_bias(float bias) {
  if (bias < -kLargestBias) {
    return bias < std::numeric_limits<float>::lowest() ? bias : -kLargestBias;
  }
  if (bias > kLargestBias) return bias > std::numeric_limits<float>::max() ? bias : kLargestBias;
  return bias;
}

// One more score of the head's rows, which weighs but has no value; without sinks it weighs
// nothing.
template <typename Head>
constexpr float sink_score(const float* sinks, Head head) {
  return sinks == nullptr ? kHidden : limited_bias(sinks[head]);
}

// Keys right of the diagonal that stay visible; kUnlimited: all.
constexpr int64_t keys_right_of_diagonal(const Problem& problem) {
  return problem.causal == Causal::kNone ? problem.window_right : 0;
}

// A row that sees no key, or none with a weight.
constexpr float kEmptyRowOut = 0;
constexpr float kEmptyRowLogSumExp = -std::numeric_limits<float>::infinity();

// By the sum of the row's weights, its sink's included. NaN is not empty.
template <typename Real>
constexpr bool is_empty_row(Real sum_of_weights) {
  return sum_of_weights == 0;
}

// Kernels keep scores in base 2, where the exponential is cheaper: 2^(s * log2(e)) = e^s. Whoever
// subtracts a largest score in base 2 must have rounded all products before, or subtract first:
// fused, the largest score's own exponent would be the rounding of a product, which at 1e12 is tens
// of thousands.
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// What queries are multiplied by. With a softcap the conversion must wait until after tanh.
constexpr float scale_to_base_2(const Problem& problem) {
  return problem.softcap > 0 ? problem.scale / problem.softcap : problem.scale * kLog2E;
}

}  // namespace wh
