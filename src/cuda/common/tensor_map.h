// Tensor maps: how TMA is told the shape and strides of a tensor in global memory.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "core/problem.h"
#include "core/status.h"

namespace wh::cuda {

// Why TMA cannot describe a [batch, heads, length, dim] tensor of a 16-bit type with these strides,
// of a canonical() problem; nullopt: it can. A stride of 0 is one of the multiples of 16 bytes that
// it takes.
std::optional<std::string> tensor_map_refusal(const char* name, const Strides& strides,
                                              int64_t dim);

// Dimensions innermost first, the first one dense; strides in elements from the second one on.
struct TensorMapShape {
  const char* name;  // of the tensor, for messages
  Dtype dtype;
  int rank;
  std::array<int64_t, 5> extent;
  std::array<int64_t, 5> stride;
  std::array<int32_t, 5> box;
  bool holds_codes = false;  // of a byte each, whatever `dtype` is
};

// `data` must be aligned to 16 bytes. Costs about 0.3 us; a map holds the address, so it is made
// anew for every call.
Result<CUtensorMap> make_tensor_map(const void* data, const TensorMapShape& shape);

}  // namespace wh::cuda
