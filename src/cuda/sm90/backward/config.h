// sm90_backward, the planner's side. docs/sm90-backward.md describes the kernel.
#pragma once

#include <array>
#include <optional>
#include <string>

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

// What both kernels for Hopper refuse, whatever they are compiled for; and where a problem has too
// many blocks, or nothing in this build takes over where something is not finite.
std::optional<std::string> gradient_refusal(const Query& query);
std::optional<std::string> takeover_refusal(const Query& query, const BackwardBlocks& blocks);

// The workspace of both: numbers of rows, and a flag.
struct GradientWorkspace {
  BackwardRows rows;
  int32_t* is_unusual;  // [1]: whether the gradients must be made by cuda_portable_backward

  GradientWorkspace(Carver& carver, const Problem& problem)
      : rows(carver, problem), is_unusual(carver.take<int32_t>(1)) {}
};
size_t gradient_workspace_bytes(const Problem& problem, const Config& config);

}  // namespace wh::cuda
