// cpu_prefill_bf16, the planner's side. docs/cpu-prefill.md describes the kernel.
#pragma once

#include "plan/kernel.h"

namespace wh::cpu {

extern const Kernel kPrefillBf16;

}  // namespace wh::cpu
