#include "plan/limits.h"

#include <fmt/format.h>

namespace wh {

Status validate(const Limits& limits) {
  if (limits.threads < 0 || limits.threads > kMaxThreads) {
    return invalid(fmt::format("limits.threads is {}; valid: 0 (every core) to {}", limits.threads,
                               kMaxThreads));
  }
  if (limits.fused_above < 0) {
    return invalid(
        fmt::format("limits.fused_above is {}; valid: 0 (always fused) or a number of keys",
                    limits.fused_above));
  }
  if (!(limits.longest_step_us >= 0) || limits.longest_step_us > 1e15) {
    return invalid(fmt::format("limits.longest_step_us is {}; valid: 0 (any) or microseconds",
                               limits.longest_step_us));
  }
  if (limits.fresh_keys < kAnyKeys) {
    return invalid(fmt::format(
        "limits.fresh_keys is {}; valid: -1 (no promise) or a number of keys", limits.fresh_keys));
  }
  return {};
}

}  // namespace wh
