// cpu_prefill_bf16, the planner's side. docs/cpu-prefill.md describes the kernel.
#pragma once

#include "cpu/prefill/layout.h"

namespace wh::cpu {

extern const Kernel kPrefillBf16;

// Which of the two the plan's variant names.
PrefillArithmetic bf16_arithmetic(const Config& config);

}  // namespace wh::cpu
