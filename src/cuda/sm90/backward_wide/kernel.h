// sm90_backward_wide, the running side.
#pragma once

#include "cuda/sm90/backward/kernel.h"
#include "cuda/sm90/backward_wide/tiles.h"

namespace wh::cuda {

// The kernel compiled for these; instance.cu.in instantiates it. A box of its maps is 64 rows of 64
// columns, of either side; GradientBlockArgs count clusters.
template <Gradient kOf, int kDimQk, int kDimV, Dtype kDtype, Scores kScores>
const void* wide_gradient_instance();

Status run_sm90_backward_wide(const Launch& launch);

}  // namespace wh::cuda
