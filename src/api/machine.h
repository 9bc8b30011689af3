// This machine, as the planner wants it.
#pragma once

#include "plan/backend.h"
#include "plan/planner.h"

namespace wh {

std::span<const Kernel* const> kernels_of(Device device);

// Facts and kernels for problems of `device`.
Machine this_machine(Device device, int32_t device_index);

// "cpu", "cuda:1".
std::string device_name(Device device, int32_t device_index);

}  // namespace wh
