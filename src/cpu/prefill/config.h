// cpu_prefill, the planner's side. docs/cpu-prefill.md describes the kernel.
#pragma once

#include "cpu/prefill/layout.h"

namespace wh::cpu {

extern const Kernel kPrefill;

}  // namespace wh::cpu
