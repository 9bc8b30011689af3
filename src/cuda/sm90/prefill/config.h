// sm90_prefill, the planner's side.
#pragma once

#include "cuda/sm90/prefill/tiles.h"
#include "plan/kernel.h"

namespace wh::cuda {

extern const Kernel kSm90Prefill;

// The one of kPrefillDims that holds the problem's dimensions with the least padding; -1: none.
int prefill_dims_index(const Problem& problem);

}  // namespace wh::cuda
