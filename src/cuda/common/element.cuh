// The device's type of an element.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "core/problem.h"

namespace wh::cuda {

template <Dtype kDtype>
using Element =
    std::conditional_t<kDtype == Dtype::kF32, float,
                       std::conditional_t<kDtype == Dtype::kF16, __half, __nv_bfloat16>>;

}  // namespace wh::cuda
