// Reads one element of the array mask as a bias on the score. Minus infinity means masked, for
// boolean masks and additive ones alike.
#pragma once

#include <limits>

#include "core/element.h"
#include "core/problem.h"
#include "core/score_rules.h"

namespace wh {

inline float mask_bias(const Problem& problem, const void* mask, int64_t batch_idx, int64_t head,
                       int64_t query_idx, int64_t key_idx) {
  if (problem.mask == MaskKind::kNone) return 0.0f;  // nor do its strides mean anything
  const Strides& stride = problem.stride_mask;
  const int64_t offset =
      batch_idx * stride[0] + head * stride[1] + query_idx * stride[2] + key_idx * stride[3];
  switch (problem.mask) {
    case MaskKind::kBoolean:
      return static_cast<const uint8_t*>(mask)[offset] != 0
                 ? 0.0f
                 : -std::numeric_limits<float>::infinity();
    case MaskKind::kAdditiveF32:
      return limited_bias(static_cast<const float*>(mask)[offset]);
    case MaskKind::kNone:
    case MaskKind::kAdditiveQ:
      break;
  }
  return limited_bias(load_element(mask, problem.dtype_q, offset));
}

}  // namespace wh
