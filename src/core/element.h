// Reads one element of a tensor as f32, whatever its type. For code that is not hot.
#pragma once

#include <cstdint>

#include "core/float16.h"
#include "core/problem.h"

namespace wh {

inline float load_element(const void* data, Dtype dtype, int64_t offset) {
  switch (dtype) {
    case Dtype::kF32:
      return static_cast<const float*>(data)[offset];
    case Dtype::kF16:
      return to_float(static_cast<const Half*>(data)[offset]);
    case Dtype::kBf16:
      break;
  }
  return to_float(static_cast<const Bfloat16*>(data)[offset]);
}

}  // namespace wh
