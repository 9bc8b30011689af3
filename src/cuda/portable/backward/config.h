// cuda_portable_backward, the planner's side. docs/cuda-portable-backward.md describes the kernel.
#pragma once

#include "cuda/portable/backward/tiles.h"
#include "plan/kernel.h"

namespace wh::cuda {

extern const Kernel kPortableBackward;

struct PortableBackwardVariant {
  Instance instance;
  BackwardTile of_queries, of_keys;
  const void* (*queries)();  // the kernel whose blocks own queries; null: not in this build
  const void* (*keys)();

  constexpr int shared_bytes() const {
    return of_queries.bytes > of_keys.bytes ? of_queries.bytes : of_keys.bytes;
  }
};

// The variant that a plan's config names, for a card with so much shared memory a block; null: it
// names none that holds the problem.
const PortableBackwardVariant* portable_backward_variant(const Problem& problem,
                                                         const Config& config,
                                                         int64_t shared_bytes);

// How a problem is cut into blocks: those that own queries first.
struct BackwardBlocks {
  int64_t query_tiles, key_tiles;  // of a head
  int64_t queries, keys;           // blocks

  BackwardBlocks(const Problem& problem, const PortableBackwardVariant& variant);
  int64_t all() const { return queries + keys; }
};

}  // namespace wh::cuda
