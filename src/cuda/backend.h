// NVIDIA GPUs; in a build without CUDA, why there are none.
#pragma once

#include "plan/backend.h"

namespace wh::cuda {

const Backend& backend();

}  // namespace wh::cuda
