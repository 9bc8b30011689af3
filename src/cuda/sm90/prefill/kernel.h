// sm90_prefill, the running side.
#pragma once

#include "cuda/sm90/prefill/tiles.h"
#include "cuda/sm90/tile_launch.h"

namespace wh::cuda {

// The kernel compiled for these dimensions; instance.cu.in instantiates it.
template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores, Layouts kLayouts>
const void* prefill_instance();
// Over codes; code_instance.cu.in instantiates it.
template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores, Layouts kLayouts>
const void* prefill_code_instance();

Status run_prefill(const Launch& launch);

}  // namespace wh::cuda
