// sm90_backward, the planner's side. docs/sm90-backward.md describes the kernel.
#pragma once

#include <array>

#include "cuda/common/attention_args.h"
#include "cuda/common/instance.h"
#include "cuda/sm90/backward/tiles.h"
#include "plan/kernel.h"

namespace wh::cuda {

extern const Kernel kSm90Backward;

struct GradientVariant {
  Instance instance;
  // By Scores: plain ones and transformed ones. Null: not in this build.
  std::array<const void*(*)(), 2> queries, keys;

  constexpr BackwardBlocks blocks(const Problem& problem) const {
    return {problem, gradient_tile(instance.dims, Side::kQueries).rows,
            gradient_tile(instance.dims, Side::kKeys).rows};
  }
};

const GradientVariant& gradient_variant(const Config& config);

// The workspace: numbers of rows, and a flag.
struct GradientWorkspace {
  BackwardRows rows;
  int32_t* is_unusual;  // [1]: whether the gradients must be made by cuda_portable_backward

  GradientWorkspace(Carver& carver, const Problem& problem)
      : rows(carver, problem), is_unusual(carver.take<int32_t>(1)) {}
};

}  // namespace wh::cuda
