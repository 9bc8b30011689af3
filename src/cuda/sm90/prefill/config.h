// sm90_prefill, the planner's side.
#pragma once

#include "cuda/sm90/prefill/tiles.h"
#include "cuda/sm90/query_tiles.h"

namespace wh::cuda {

extern const Kernel kSm90Prefill;

const TileVariant& prefill_variant(const Config& config);

// The tile of the kernel that runs a problem by that variant.
PrefillTile prefill_tile_of(const Problem& problem, const TileVariant& variant);

}  // namespace wh::cuda
