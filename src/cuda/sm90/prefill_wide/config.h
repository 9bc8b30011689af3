// sm90_prefill_wide, the planner's side.
#pragma once

#include "cuda/sm90/query_tiles.h"

namespace wh::cuda {

extern const Kernel kSm90PrefillWide;

const TileVariant& wide_variant(const Config& config);

// How the rows are laid over the tiles of a cluster and in which order those run, without the
// counter.
TileOrder wide_order(const Problem& problem);

}  // namespace wh::cuda
