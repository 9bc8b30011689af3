// sm90_prefill_wide, the planner's side.
#pragma once

#include "cuda/common/attention_args.h"
#include "cuda/common/tile_order.h"
#include "cuda/sm90/prefill_wide/tiles.h"
#include "plan/kernel.h"

namespace wh::cuda {

extern const Kernel kSm90PrefillWide;

// The first of kWideDims that holds the problem's dimensions; -1: none.
int wide_dims_index(const Problem& problem);

// How the rows are laid over the tiles of a cluster and in which order those run, without the
// counter.
TileOrder wide_order(const Problem& problem);

}  // namespace wh::cuda
