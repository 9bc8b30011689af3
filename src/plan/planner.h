// Enumerate, ask, discard what does not fit, take the fastest of the rest.
#pragma once

#include <span>
#include <string_view>

#include "plan/plan.h"
#include "plan/profile.h"

namespace wh {

// The machine a plan is made for: its facts and the kernels it can run, in order.
struct Machine {
  const DeviceFacts& facts;
  std::span<const Kernel* const> kernels;
  const Profile* profile = nullptr;  // measured costs; null: the kernels' formulas alone
  std::string_view estimates = "formula";
};

// Answers with a plan that is not runnable when the limits allow no kernel, and with an error when
// problem or limits make no sense.
Result<Plan> make_plan(const Problem& problem, const Limits& limits, const Machine& machine);

}  // namespace wh
