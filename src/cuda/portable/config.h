// cuda_portable, the planner's side. docs/cuda-portable.md describes the kernel.
#pragma once

#include "cuda/portable/code_tiles.h"
#include "cuda/portable/tiles.h"
#include "plan/kernel.h"

namespace wh::cuda {

extern const Kernel kPortable;

enum class Cores : uint8_t { kTensor, kCuda };

// One of tiles.h or code_tiles.h on the tensor cores, or of few_rows.h on the CUDA cores.
struct PortableVariant {
  Instance instance;
  Cores cores;
  int rows, keys;             // of a block; of a tile
  int product_rows;           // what rows are worked on in: 16 or 32 by a warp
  int threads, shared_bytes;  // of tiles of codes the problem's: code_layout()
  int resident;               // blocks that the registers of an SM hold
  const void* (*function)(bool pages_cut_tiles);
  bool reads_codes = false;  // quantised keys and values, and no others

  // Of code_tiles.h.
  constexpr bool reads_code_tiles() const { return reads_codes && cores == Cores::kTensor; }
  constexpr CodeTile code_tile() const { return {instance.dims.dim_v, rows}; }
};

// The variant that a plan's config names, for a card with so much shared memory a block; null: it
// names none that holds the problem.
const PortableVariant* portable_variant(const Problem& problem, const Config& config,
                                        int64_t shared_bytes);

}  // namespace wh::cuda
