// sm90_decode, the planner's side. docs/sm90-decode.md describes the kernel.
#pragma once

#include "cuda/common/instance.h"
#include "plan/kernel.h"

namespace wh::cuda {

extern const Kernel kSm90Decode;

struct DecodeVariant {
  Instance instance;
  int32_t tile_k;
  int32_t threads;
  int32_t shared_bytes;
  int32_t blocks_per_sm;
  const void* (*function)();
};

const DecodeVariant& decode_variant(const Config& config);

}  // namespace wh::cuda
