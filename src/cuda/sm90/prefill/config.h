// sm90_prefill, the planner's side.
#pragma once

#include "cuda/common/attention_args.h"
#include "cuda/common/tile_order.h"
#include "cuda/sm90/prefill/tiles.h"
#include "plan/kernel.h"

namespace wh::cuda {

extern const Kernel kSm90Prefill;

// The first of kPrefillDims that holds the problem's dimensions with the least padding; -1: none.
int prefill_dims_index(const Problem& problem);

// How the rows are laid over tiles and in which order the tiles run, without the counter.
TileOrder prefill_order(const Problem& problem, PrefillTile tile);

// Whether tiles differ in length, so that claiming them beats dealing them.
bool prefill_claims_tiles(const Problem& problem, const TileOrder& order, int32_t blocks);

}  // namespace wh::cuda
