// The CUDA kernels, in the order in which they are offered; the last one always works.
#pragma once

#include <span>

#include "plan/kernel.h"

namespace wh::cuda {

std::span<const Kernel* const> kernels();

}  // namespace wh::cuda
