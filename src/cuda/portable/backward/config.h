// cuda_portable_backward, the planner's side. docs/cuda-portable-backward.md describes the kernel.
#pragma once

#include "cuda/cuda_facts.h"
#include "cuda/gradients/items.h"
#include "cuda/portable/backward/tiles.h"
#include "plan/kernel.h"

namespace wh::cuda {

extern const Kernel kPortableBackward;

struct PortableBackwardVariant {
  Instance instance;
  BackwardTile of_queries, of_keys;
  const void* (*queries)();  // the kernel whose blocks own queries; null: not in this build
  const void* (*keys)();

  constexpr BackwardBlocks blocks(const Problem& problem) const {
    return {problem, of_queries.rows, of_keys.rows};
  }
  constexpr int shared_bytes() const {
    return of_queries.bytes > of_keys.bytes ? of_queries.bytes : of_keys.bytes;
  }
};

// The variant that a plan's config names, for a card with so much shared memory a block; null: it
// names none that holds the problem.
const PortableBackwardVariant* portable_backward_variant(const Problem& problem,
                                                         const Config& config,
                                                         int64_t shared_bytes);
// The one that the planner takes for these heads; null: there is none.
const PortableBackwardVariant* portable_backward_variant(const Problem& problem,
                                                         const CudaFacts& cuda);

}  // namespace wh::cuda
