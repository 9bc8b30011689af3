// One line for each new plan: what, why, bytes, time.
#pragma once

#include "plan/plan.h"

namespace wh {

using PlanLog = void (*)(void* context, const char* line);

// Takes the lines from now on; null: stderr, where WIDEHEAD_LOG=plan asks for them.
void set_plan_log(PlanLog log, void* context);
void log_plan(const Plan& plan);

// The line, without an end.
std::string plan_line(const Plan& plan);

}  // namespace wh
