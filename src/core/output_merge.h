// Attention over parts of the keys as runs leave it, and what becomes of it on whatever device has
// it.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "core/problem.h"

namespace wh {

// Normalised, with a natural log-sum-exp.
struct OutputPart {
  const void* out;           // [batch, heads_q, len_q, dim_v]
  const float* log_sum_exp;  // [batch, heads_q, len_q]; minus infinity: out is not read
  Dtype dtype;
  Strides stride_out;
  std::array<int64_t, 3> stride_log_sum_exp;
};

struct OutputMerge {
  std::array<int64_t, 4> extents;  // batch, heads_q, len_q, dim_v
  Dtype dtype;
  void* out;
  Strides stride_out;
  float* log_sum_exp;  // null: not wanted
  std::array<int64_t, 3> stride_log_sum_exp;
  const float* sinks;  // [heads_q], or null
  std::span<const OutputPart> parts;

  int64_t rows() const { return extents[0] * extents[1] * extents[2]; }
};

}  // namespace wh
