// The CPU's kernels, in the order in which they are offered; the last one of each pass always
// works.
#pragma once

#include <span>

#include "plan/kernel.h"

namespace wh::cpu {

extern const Kernel kReference;
extern const Kernel kReferenceBackward;

std::span<const Kernel* const> kernels();

}  // namespace wh::cpu
