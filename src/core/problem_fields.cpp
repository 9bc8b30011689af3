#include "core/problem_fields.h"

#include <fmt/format.h>

#include <cmath>

namespace wh {

Status check_range(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return {};
  return invalid(fmt::format("{} is {}; it must be between {} and {}", name, value, least, most));
}

Status Real::check(float value) const {
  if (std::isfinite(value) && value >= least) return {};
  return invalid(fmt::format("{} is {}; it must be {}", name, value, valid));
}

}  // namespace wh
