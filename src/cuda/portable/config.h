// cuda_portable, the planner's side. docs/cuda-portable.md describes the kernel.
#pragma once

#include "cuda/portable/tiles.h"
#include "plan/kernel.h"

namespace wh::cuda {

extern const Kernel kPortable;

// A compiled kernel.
struct PortableVariant {
  HeadDims dims;
  Dtype dtype;
  PortableTile tile;
  const void* (*instance)();
};

// The variant that a plan's config names for a card with so much shared memory a block; null: it
// names none that holds the problem.
const PortableVariant* portable_variant(const Problem& problem, const Config& config,
                                        int64_t shared_bytes);

}  // namespace wh::cuda
