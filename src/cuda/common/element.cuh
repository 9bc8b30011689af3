// The device's type of an element.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/problem.h"

namespace wh::cuda {

template <Dtype>
struct ElementOf;
template <>
struct ElementOf<Dtype::kF32> {
  using Type = float;
};
template <>
struct ElementOf<Dtype::kF16> {
  using Type = __half;
};
template <>
struct ElementOf<Dtype::kBf16> {
  using Type = __nv_bfloat16;
};

template <Dtype kDtype>
using Element = typename ElementOf<kDtype>::Type;

}  // namespace wh::cuda
