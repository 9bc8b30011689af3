// sm90_decode, the planner's side. docs/sm90-decode.md describes the kernel.
#pragma once

#include <array>

#include "cuda/common/instance.h"
#include "cuda/sm90/decode/share_rule.h"
#include "plan/kernel.h"

namespace wh::cuda {

extern const Kernel kSm90Decode;

struct DecodeVariant {
  Instance instance;
  int32_t tile_k;
  int32_t threads;
  int32_t shared_bytes;
  int32_t blocks_per_sm;
  std::array<const void* (*)(), 2> functions;  // by Layouts
  bool reads_codes = false;                    // of K and V, a byte each
};

const DecodeVariant& decode_variant(const Config& config);

// For sequences with lengths of their own; without shares in a wave where all are cut alike.
ShareRule share_rule(const Problem& problem, const Config& config);

}  // namespace wh::cuda
