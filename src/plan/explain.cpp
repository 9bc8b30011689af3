#include <fmt/format.h>

#include <algorithm>

#include "plan/names.h"
#include "plan/plan.h"

namespace wh {

std::string format_bytes(uint64_t bytes) {
  static const char* const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  if (bytes < 1024) return fmt::format("{} B", bytes);
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(units)) {
    value /= 1024;
    ++unit;
  }
  return fmt::format("{:.{}f} {}", value, value < 10 ? 2 : (value < 100 ? 1 : 0), units[unit]);
}

std::string format_us(double us) {
  if (us < 1e3) return fmt::format("{:.3g} us", us);
  if (us < 1e6) return fmt::format("{:.3g} ms", us / 1e3);
  return fmt::format("{:.4g} s", us / 1e6);
}

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
