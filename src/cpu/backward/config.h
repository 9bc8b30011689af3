// cpu_backward, the planner's side.
#pragma once

#include "plan/kernel.h"

namespace wh::cpu {

extern const Kernel kBackward;

}  // namespace wh::cpu
