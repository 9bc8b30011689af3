// Elements of tensors on the host, of any type and stride.
#pragma once

#include <cstring>

#include "core/element.h"
#include "core/problem.h"

namespace wh {

inline int64_t offset_of(const Strides& stride, int64_t b, int64_t h, int64_t i, int64_t d) {
  return b * stride[0] + h * stride[1] + i * stride[2] + d * stride[3];
}

inline int64_t bytes_of(Dtype dtype) { return static_cast<int64_t>(dtype_bytes(dtype)); }

// Wherever it lies: a tensor's first byte may be odd.
inline void put(std::byte* data, Dtype dtype, int64_t offset, float value) {
  with_element_type(dtype, [&]<typename T>(T) {
    const T element = from_float<T>(value);
    std::memcpy(data + offset * static_cast<int64_t>(sizeof(T)), &element, sizeof(T));
  });
}

}  // namespace wh
