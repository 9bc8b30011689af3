// Which tensors the loaders of cuda_portable may copy in pieces of several elements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/problem.h"

namespace wh::cuda::portable {

// Whether all rows of `dim` elements begin at a multiple of `bytes`, have their elements side by
// side, and consist of whole pieces of that many bytes. One row alone has a stride too
// (canonical()): the loaders step over rows that do not exist, and those addresses, though nothing
// is read there, must be aligned.
inline bool is_whole(const void* data, const Strides& stride, int64_t dim, Dtype dtype,
                     size_t bytes) {
  const auto elements = static_cast<int64_t>(bytes / dtype_bytes(dtype));
  if (reinterpret_cast<uintptr_t>(data) % bytes != 0 || dim % elements != 0) return false;
  for (size_t i = 0; i < 3; ++i) {
    if (stride[i] % elements != 0) return false;
  }
  return stride[3] == 1;
}

}  // namespace wh::cuda::portable
