// cpu_prefill_bf16, the running side.
#pragma once

#include "plan/kernel.h"

namespace wh::cpu {

Status run_prefill_bf16(const Launch& launch);

}  // namespace wh::cpu
