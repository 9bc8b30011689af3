// sm90_prefill, the planner's side.
#pragma once

#include <array>

#include "cuda/common/attention_args.h"
#include "cuda/common/instance.h"
#include "plan/kernel.h"

namespace wh::cuda {

extern const Kernel kSm90Prefill;

struct PrefillVariant {
  Instance instance;
  std::array<const void* (*)(), 3> function;  // by Scores
};

const PrefillVariant& prefill_variant(const Config& config);

}  // namespace wh::cuda
