// A plan as JSON and back. docs/planner.md lists the fields.
#pragma once

#include <string>

#include "plan/planner.h"

namespace wh {

std::string to_json(const Plan& plan);

// The machine for problems of a device.
using MachineOf = Machine (*)(Device device, int32_t device_index);

// The inverse of to_json(). Checks that the plan is the one that would be made now: the same kernel
// with the same configuration and workspace.
Result<Plan> plan_from_json(const std::string& text, MachineOf machine_of);

}  // namespace wh
