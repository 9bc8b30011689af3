// The bound of biases and sinks, for host and device code alike.
#pragma once

#include <limits>

namespace wh {

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

}  // namespace wh
