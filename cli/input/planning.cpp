#include "input/planning.h"

#include <fmt/format.h>

#include "api/environment.h"
#include "api/machine.h"
#include "api/plan_log.h"
#include "plan/planner.h"

namespace wh::cli {

Result<Plan> plan_as_library(const Problem& p, const Limits& flags) {
  if (p.device == Device::kCuda && flags.threads != 0) {
    return invalid("--threads has no effect with --device cuda; leave it out");
  }
  if (p.device == Device::kCpu && flags.fresh_keys != kAnyKeys) {
    return invalid("--fresh-keys has no effect on the CPU; leave it out, or add --device cuda");
  }
  Limits limits = flags;
  if (Status status = apply(environment(), p.device, limits); !status.ok()) return status;
  Result<Plan> plan = make_plan(p, limits, this_machine(p.device, p.device_index));
  if (plan.ok()) log_plan(*plan);
  return plan;
}

Json environment_json(Device device) {
  Json json = Json::object();
  for (const auto& [name, value] : variables_for(environment(), device)) json[name] = value;
  return json;
}

std::string environment_line(Device device) {
  std::string line;
  for (const auto& [name, value] : variables_for(environment(), device)) {
    line += fmt::format("{}{}={}", line.empty() ? "variables  " : ", ", name, value);
  }
  return line.empty() ? "" : line + ": the environment wins over the flags\n";
}

}  // namespace wh::cli
