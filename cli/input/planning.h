// Plans as the library makes them for a program.
#pragma once

#include "input/embedded.h"
#include "plan/plan.h"

namespace wh::cli {

// The limits of a program: the environment's over those of the flags. An error for a limit that has
// no effect on the problem's device.
Result<Limits> limits_as_library(const Problem& problem, const Limits& flags);

// A plan within those limits, with a line on stderr when WIDEHEAD_LOG asks for it.
Result<Plan> plan_as_library(const Problem& problem, const Limits& flags);

// The environment's variables that had a say in the plan of a problem on `device`: an object.
Json environment_json(const Problem& p);
// The same as a line of a plan, "" without any.
std::string environment_line(const Problem& p);

}  // namespace wh::cli
