#include "input/limits_flags.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <charconv>

#include "core/byte_size.h"
#include "input/number_flag.h"
#include "plan/names.h"
#include "report/session.h"

namespace wh::cli {

void add_limits_flags(CLI::App& app, LimitsFlags& flags) {
  const auto limit = [](CLI::Option* option) { option->group("LIMITS"); };
  const auto text = [&](const char* name, std::string& value, const char* help) {
    limit(app.add_option(name, value, help)->check(refuse_empty));
  };
  text("--workspace", flags.workspace, "the most a plan may take: 512MiB");
  text("--policy", flags.policy, "automatic, fused or fused-above=16384");
  text("--kernel", flags.kernel, "force this kernel");
  limit(add_number_flag(app, "--threads", flags.threads, Range<int32_t>{0, kMaxThreads},
                        "CPU threads (every core)"));
  text("--precision", flags.precision, "native or high");
  limit(add_number_flag(app, "--step-ms", flags.step_ms, Range<double>{0, 1e12},
                        "the longest piece that cannot be cancelled"));
  limit(app.add_flag("--batch-invariant", flags.batch_invariant,
                     "a row's bits do not depend on the batch"));
  limit(add_number_flag(app, "--fresh-keys", flags.fresh_keys,
                        Range<int64_t>{kAnyKeys, std::numeric_limits<int64_t>::max()},
                        "promise: older than the kernel in front are all keys but the last N"));
}

Result<Limits> read_limits(const LimitsFlags& flags) {
  Limits limits;
  limits.kernel = flags.kernel;
  limits.threads = flags.threads;
  limits.longest_step_us = flags.step_ms * 1e3;
  limits.batch_invariant = flags.batch_invariant;
  limits.fresh_keys = flags.fresh_keys;
  if (!flags.workspace.empty()) {
    const auto bytes = parse_bytes(flags.workspace);
    if (!bytes) {
      return invalid(fmt::format("--workspace is \"{}\"; it must be bytes, or a size as in 512MiB",
                                 flags.workspace));
    }
    limits.workspace_bytes = *bytes;
  }
  if (!flags.policy.empty() && !flags.kernel.empty()) {
    return invalid("--policy has no effect with --kernel, which forces one; leave one of them out");
  }
  if (!flags.policy.empty()) {
    const size_t equals = flags.policy.find('=');
    const auto policy = kPolicies.value(flags.policy.substr(0, equals));
    if (!policy || (equals != std::string::npos && *policy != Policy::kFusedAbove)) {
      return invalid(fmt::format("--policy is \"{}\"; valid: automatic, fused, fused-above=KEYS",
                                 flags.policy));
    }
    limits.policy = *policy;
    if (equals != std::string::npos) {
      const std::string keys = flags.policy.substr(equals + 1);
      const auto [end, error] =
          std::from_chars(keys.data(), keys.data() + keys.size(), limits.fused_above);
      if (error != std::errc() || end != keys.data() + keys.size()) {
        return invalid(fmt::format("--policy is \"{}\"; KEYS must be an integer", flags.policy));
      }
    }
  }
  if (!flags.precision.empty()) {
    const auto precision = kPrecisions.value(flags.precision);
    if (!precision) {
      return invalid(
          fmt::format("--precision is \"{}\"; valid: {}", flags.precision, kPrecisions.list()));
    }
    limits.precision = *precision;
  }
  if (Status status = validate(limits); !status.ok()) return status;
  return limits;
}

}  // namespace wh::cli
