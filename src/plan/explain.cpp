#include "plan/explain.h"

#include <fmt/format.h>

#include <algorithm>

#include "plan/names.h"
#include "plan/units.h"

namespace wh {

std::string explain(const Plan& plan) {
  std::string text =
      fmt::format("problem    {}\ndevice     {}\n", describe(plan.problem), plan.device);
  if (plan.runnable()) {
    text += fmt::format("kernel     {} ({}), {} workspace, about {}\n", plan.kernel, plan.variant,
                        format_bytes(plan.workspace_bytes), format_us(plan.estimated_us));
  } else {
    text += "kernel     none is allowed by the limits\n";
  }
  text += fmt::format("estimates  {}\n", plan.estimates);
  size_t width = 6;
  for (const Candidate& candidate : plan.candidates)
    width = std::max(width, candidate.kernel.size());
  text += fmt::format("\n{:<{}}  {:<11}  {:>10}  {:>9}  {}\n", "kernel", width, "verdict",
                      "workspace", "estimate", "reason");
  for (const Candidate& candidate : plan.candidates) {
    const bool can = candidate.verdict != Verdict::kRefused || candidate.estimated_us > 0;
    text += fmt::format("{:<{}}  {:<11}  {:>10}  {:>9}  {}\n", candidate.kernel, width,
                        kVerdicts.name(candidate.verdict),
                        can ? format_bytes(candidate.workspace_bytes) : "-",
                        can ? format_us(candidate.estimated_us) : "-", candidate.reason);
  }
  // A line without a reason would end in blanks.
  std::string trimmed;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    const size_t last = text.find_last_not_of(' ', end - 1);
    trimmed.append(text, begin, last + 1 > begin ? last + 1 - begin : 0);
    trimmed += '\n';
    begin = end + 1;
  }
  return trimmed;
}

}  // namespace wh
