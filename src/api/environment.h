// The environment variables that steer a program which cannot be changed. Read here and nowhere
// else, once.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/problem.h"
#include "plan/limits.h"

namespace wh {

struct Environment {
  std::string kernel;           // WIDEHEAD_KERNEL: forces it wherever the device and pass have it
  std::string fused_above;      // WIDEHEAD_FUSED_ABOVE: keys; a kernel the caller forces gives way
  std::string workspace_limit;  // WIDEHEAD_WORKSPACE_LIMIT: "512MiB" or bytes
  std::string log;              // WIDEHEAD_LOG: "plan" prints a line for each new plan on stderr

  bool logs_plans() const { return log == "plan"; }
};

// This process's, as it was at the first call.
const Environment& environment();

// Overrides what the caller set: the variables exist for programs whose calls cannot be changed.
// Answers with an error that names the variable when its value makes no sense.
Status apply(const Environment& environment, const Problem& problem, Limits& limits);

// The variables that change what apply() answers for `problem`, with their values: for people who
// ask why a plan is what it is.
std::vector<std::pair<std::string, std::string>> variables_for(const Environment& environment,
                                                               const Problem& problem);

}  // namespace wh
