// cpu_decode, the running side.
#pragma once

#include "plan/kernel.h"

namespace wh::cpu {

Status run_decode(const Launch& launch);

}  // namespace wh::cpu
