// LIMITS of the command line.
#pragma once

#include <string>

#include "plan/limits.h"

namespace CLI {
class App;
}

namespace wh::cli {

// As written; empty: not given.
struct LimitsFlags {
  std::string workspace, policy, kernel, precision;
  int32_t threads = 0;
  double step_ms = 0;
  bool batch_invariant = false;
  int64_t fresh_keys = kAnyKeys;
};

void add_limits_flags(CLI::App& app, LimitsFlags& flags);
Result<Limits> read_limits(const LimitsFlags& flags);

}  // namespace wh::cli
