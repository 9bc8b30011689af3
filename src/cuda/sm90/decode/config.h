// sm90_decode, the planner's side. docs/sm90-decode.md describes the kernel.
#pragma once

#include "plan/kernel.h"

namespace wh::cuda {

extern const Kernel kSm90Decode;

// A compiled kernel, and the widest problem it takes.
struct DecodeVariant {
  int64_t dim_qk, dim_v;
  int32_t tile_k;
  int32_t threads;
  int32_t shared_bytes;
  const void* (*instance_f16)();
  const void* (*instance_bf16)();
};

// The narrowest variant that holds the problem; null: its heads are too wide.
const DecodeVariant* decode_variant(const Problem& problem);

// How a problem is cut into blocks; the same for planning and running. A block is up to 64 query
// rows of one (batch, kv head) pair and one share of the key tiles that any of them may see. The
// shares follow the key lengths on the device; their number does not.
struct DecodeShape {
  int64_t row_tiles;  // of a pair
  int64_t items;      // batch * heads_kv * row_tiles
  int64_t splits;     // blocks of an item; 1: keys are not split
  int64_t blocks;     // items * splits

  DecodeShape(const Problem& problem, const Config& config);
};

}  // namespace wh::cuda
