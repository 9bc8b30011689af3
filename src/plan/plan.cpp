#include "plan/plan.h"

#include <fmt/format.h>

namespace wh {

Status runnable_status(const Plan& plan) {
  if (plan.runnable()) return {};
  std::string message = "no kernel is allowed for " + describe(plan.problem) + ":";
  for (const Candidate& candidate : plan.candidates) {
    message += fmt::format("\n  {}: {}", candidate.kernel, candidate.reason);
  }
  return {Code::kRefused, message};
}

}  // namespace wh
