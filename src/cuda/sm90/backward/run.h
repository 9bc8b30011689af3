// What runs of sm90_backward and sm90_backward_wide have in common: the pass before the products,
// steps, and cuda_portable_backward behind them.
#pragma once

#include <cstdint>
#include <functional>

#include "cuda/sm90/backward/kernel.h"

namespace wh::cuda {

// Blocks [first, end) of one side, or clusters.
struct GradientRange {
  Side side;
  int64_t tiles;  // of a head
  int64_t first, end;
};

using LaunchRange = std::function<Status(const GradientBlockArgs& args, const GradientRange&)>;

// `launch_range` launches what the kernel has for a part of its blocks.
Status run_gradients(const Launch& launch, const BackwardBlocks& blocks,
                     const LaunchRange& launch_range);

struct GradientLaunch {
  GradientTile tile;  // a box of its maps has so many rows
  const void* function;
  int shared_bytes;
  int cluster = 1;  // blocks for each item of the range
};
Status launch_gradients(const Launch& launch, GradientBlockArgs args, const GradientRange& range,
                        const GradientLaunch& of);

}  // namespace wh::cuda
