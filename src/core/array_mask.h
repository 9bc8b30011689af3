// Reads one element of the array mask as a bias on the score. Minus infinity means masked, for
// boolean masks and additive ones alike.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/element.h"
#include "core/problem.h"

namespace wh {

// Finite biases beyond it count as it: scaled to base 2 and added to a score of at most as much
// they stay finite. Programs mask with the lowest number of f32, which is not minus infinity: where
// all keys of a row have it, the row is the mean of V and not empty.
constexpr float kLargestBias = 0x1p126f;

inline float limited_bias(float bias) {
  return std::isfinite(bias) ? std::clamp(bias, -kLargestBias, kLargestBias) : bias;
}

inline float mask_bias(const Problem& problem, const void* mask, int64_t batch_idx, int64_t head,
                       int64_t query_idx, int64_t key_idx) {
  const Strides& stride = problem.stride_mask;
  const int64_t offset =
      batch_idx * stride[0] + head * stride[1] + query_idx * stride[2] + key_idx * stride[3];
  switch (problem.mask) {
    case MaskKind::kNone:
      return 0.0f;
    case MaskKind::kBoolean:
      return static_cast<const uint8_t*>(mask)[offset] != 0
                 ? 0.0f
                 : -std::numeric_limits<float>::infinity();
    case MaskKind::kAdditiveF32:
      return limited_bias(static_cast<const float*>(mask)[offset]);
    case MaskKind::kAdditiveQ:
      break;
  }
  return limited_bias(load_element(mask, problem.dtype_q, offset));
}

}  // namespace wh
