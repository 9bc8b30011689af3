// sm90_prefill_wide, the running side.
#pragma once

#include "cuda/sm90/prefill_wide/tiles.h"
#include "cuda/sm90/tile_launch.h"

namespace wh::cuda {

// The kernel compiled for these dimensions, over elements and over codes; instance.cu.in and
// code_instance.cu.in instantiate it.
template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores, Layouts kLayouts>
const void* wide_instance();
template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores, Layouts kLayouts>
const void* wide_code_instance();

Status run_prefill_wide(const Launch& launch);

}  // namespace wh::cuda
