#include "input/planning.h"

#include <fmt/format.h>

#include "api/environment.h"
#include "api/machine.h"
#include "api/run.h"
#include "core/names.h"

namespace wh::cli {

Result<Limits> limits_as_library(const Problem& p, const Limits& flags) {
  const bool is_host = backend(p.device).is_host();
  if (!is_host && flags.threads != 0) {
    return invalid(fmt::format("--threads has no effect with --device {}; leave it out",
                               kDevices.name(p.device)));
  }
  if (is_host && flags.fresh_keys != kAnyKeys) {
    return invalid("--fresh-keys has no effect on the CPU; leave it out, or add --device cuda");
  }
  Limits limits = flags;
  if (Status status = apply(environment(), p, limits); !status.ok()) return status;
  return limits;
}

Result<Plan> plan_as_library(const Problem& p, const Limits& flags) {
  const Result<Limits> limits = limits_as_library(p, flags);
  if (!limits.ok()) return limits.status();
  return plan_here(p, *limits);
}

Json environment_json(const Problem& p) {
  Json json = Json::object();
  for (const auto& [name, value] : variables_for(environment(), p)) json[name] = value;
  return json;
}

std::string environment_line(const Problem& p) {
  std::string line;
  for (const auto& [name, value] : variables_for(environment(), p)) {
    line += fmt::format("{}{}={}", line.empty() ? "variables  " : ", ", name, value);
  }
  return line.empty() ? "" : line + ": the environment wins over the flags\n";
}

}  // namespace wh::cli
