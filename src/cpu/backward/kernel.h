// cpu_backward, the running side.
#pragma once

#include "core/status.h"
#include "plan/kernel.h"

namespace wh::cpu {

Status run_backward(const Launch& launch);

}  // namespace wh::cpu
