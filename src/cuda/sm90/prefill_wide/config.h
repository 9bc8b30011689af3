// sm90_prefill_wide, the planner's side.
#pragma once

#include <array>

#include "cuda/common/attention_args.h"
#include "cuda/common/instance.h"
#include "cuda/common/tile_order.h"
#include "plan/kernel.h"

namespace wh::cuda {

extern const Kernel kSm90PrefillWide;

struct WideVariant {
  Instance instance;
  std::array<const void* (*)(), 3> function;  // by Scores
};

const WideVariant& wide_variant(const Config& config);

// How the rows are laid over the tiles of a cluster and in which order those run, without the
// counter.
TileOrder wide_order(const Problem& problem);

}  // namespace wh::cuda
