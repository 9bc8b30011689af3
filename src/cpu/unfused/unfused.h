// cpu_unfused: matmul, softmax, matmul, head by head: the baseline that every fused kernel must
// beat, and the route where it wins.
#pragma once

#include "plan/kernel.h"

namespace wh::cpu {

extern const Kernel kUnfused;

// Whether this build multiplies with a CBLAS or with the loop of its own.
bool unfused_has_cblas();

}  // namespace wh::cpu
