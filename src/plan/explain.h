// A plan as a table for people.
#pragma once

#include <string>

#include "plan/plan.h"

namespace wh {

// The problem, the choice, every candidate with its verdict and reason.
std::string explain(const Plan& plan);

}  // namespace wh
