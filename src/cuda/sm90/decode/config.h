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

}  // namespace wh::cuda
