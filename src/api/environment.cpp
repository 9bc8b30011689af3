#include "api/environment.h"

#include <fmt/format.h>

#include <charconv>
#include <cstdlib>

#include "api/machine.h"
#include "core/byte_size.h"
#include "core/names.h"
#include "core/nearest_name.h"

namespace wh {
namespace {

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

bool is_kernel_for(const std::string& name, const Problem& problem) {
  const Kernel* kernel = find_kernel(kernels_of(problem.device), name);
  return kernel != nullptr && kernel->pass == problem.pass;
}

Status apply_kernel(const std::string& name, const Problem& problem, Limits& limits) {
  if (is_kernel_for(name, problem)) {
    limits.kernel = name;
    return {};
  }
  // A program may use both devices and passes: a kernel of the others does not concern this
  // problem.
  std::vector<std::string> names;
  for (const Device each : kDevices.values()) {
    for (const Kernel* kernel : kernels_of(each)) {
      if (name == kernel->name) return {};
      names.push_back(kernel->name);
    }
  }
  return invalid(fmt::format("WIDEHEAD_KERNEL is \"{}\", which is no kernel; did you mean \"{}\"?",
                             name, nearest_name(name, names)));
}

}  // namespace

const Environment& environment() {
  static const Environment values{variable("WIDEHEAD_KERNEL"), variable("WIDEHEAD_FUSED_ABOVE"),
                                  variable("WIDEHEAD_WORKSPACE_LIMIT"), variable("WIDEHEAD_LOG")};
  return values;
}

Status apply(const Environment& environment, const Problem& problem, Limits& limits) {
  if (const std::string& text = environment.fused_above; !text.empty()) {
    int64_t keys = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), keys);
    if (error != std::errc() || end != text.data() + text.size() || keys < 0) {
      return invalid(fmt::format(
          "WIDEHEAD_FUSED_ABOVE is \"{}\"; valid: 0 (always fused) or a number of keys", text));
    }
    limits.policy = Policy::kFusedAbove;
    limits.fused_above = keys;
    limits.kernel.clear();  // a policy has no say where a kernel is forced
  }
  if (!environment.kernel.empty()) {
    if (Status status = apply_kernel(environment.kernel, problem, limits); !status.ok()) {
      return status;
    }
  }
  if (const std::string& text = environment.workspace_limit; !text.empty()) {
    const auto bytes = parse_bytes(text);
    if (!bytes) {
      return invalid(fmt::format(
          "WIDEHEAD_WORKSPACE_LIMIT is \"{}\"; valid: bytes, or a size as in 512MiB", text));
    }
    limits.workspace_bytes = *bytes;
  }
  if (!environment.log.empty() && !environment.logs_plans()) {
    return invalid(fmt::format("WIDEHEAD_LOG is \"{}\"; valid: plan", environment.log));
  }
  return {};
}

std::vector<std::pair<std::string, std::string>> variables_for(const Environment& environment,
                                                               const Problem& problem) {
  std::vector<std::pair<std::string, std::string>> variables;
  if (is_kernel_for(environment.kernel, problem)) {
    variables.emplace_back("WIDEHEAD_KERNEL", environment.kernel);
  }
  if (!environment.fused_above.empty()) {
    variables.emplace_back("WIDEHEAD_FUSED_ABOVE", environment.fused_above);
  }
  if (!environment.workspace_limit.empty()) {
    variables.emplace_back("WIDEHEAD_WORKSPACE_LIMIT", environment.workspace_limit);
  }
  return variables;
}

}  // namespace wh
