// sm90_prefill, the planner's side.
#pragma once

#include "cuda/sm90/query_tiles.h"

namespace wh::cuda {

extern const Kernel kSm90Prefill;

const TileVariant& prefill_variant(const Config& config);

}  // namespace wh::cuda
