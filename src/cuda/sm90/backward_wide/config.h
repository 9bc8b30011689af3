// sm90_backward_wide, the planner's side. docs/sm90-backward-wide.md describes the kernel.
#pragma once

#include <array>

#include "cuda/common/instance.h"
#include "cuda/sm90/backward_wide/tiles.h"
#include "plan/kernel.h"

namespace wh::cuda {

extern const Kernel kSm90BackwardWide;

struct WideGradientVariant {
  Instance instance;
  // By Scores: plain ones and transformed ones. Null: not in this build.
  std::array<const void*(*)(), 2> dq, dk, dv;
};

const WideGradientVariant& wide_gradient_variant(const Config& config);

// Of clusters.
constexpr BackwardBlocks wide_gradient_blocks(const Problem& problem) {
  return {problem, kWideGradientRows, kWideGradientRows};
}

}  // namespace wh::cuda
