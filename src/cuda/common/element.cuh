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

// Calls body with a value of the device's type, for kernels that are told it when they run.
template <typename Body>
__device__ __forceinline__ auto with_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kF16:
      return body(__half());
    case Dtype::kBf16:
      return body(__nv_bfloat16());
    case Dtype::kF32:
      break;
  }
  return body(float());
}

}  // namespace wh::cuda
