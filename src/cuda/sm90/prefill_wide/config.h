// sm90_prefill_wide, the planner's side.
#pragma once

#include "cuda/sm90/prefill_wide/tiles.h"
#include "cuda/sm90/query_tiles.h"

namespace wh::cuda {

extern const Kernel kSm90PrefillWide;

const TileVariant& wide_variant(const Config& config);

// The tile that the variant is compiled with for such a problem.
WideTile wide_tile_of(const Problem& problem, const TileVariant& variant);

// How the rows are laid over the tiles of a cluster, or of a block, and in which order those run,
// without the counter.
TileOrder wide_order(const Problem& problem, const WideTile& tile);

}  // namespace wh::cuda
