// This machine, as the planner wants it.
#pragma once

#include "plan/planner.h"

namespace wh {

std::span<const Kernel* const> kernels_of(Device device);

// Facts and kernels for problems of `device`.
Machine this_machine(Device device, int32_t device_index);

// Runs the kernel of a plan with this name, a CUDA one with the problem's device made current.
// Where the problem says that V lies in K, the tensors' v need not be set.
Status run_kernel(const std::string& name, const Launch& launch);

}  // namespace wh
