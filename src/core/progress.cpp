#include "core/progress.h"

#include <fmt/format.h>

namespace wh {

Status Progress::status(const char* state_of_out) const {
  if (!is_cancelled_) return {};
  return {Code::kCancelled, fmt::format("cancelled after {} of {} steps; out is {}", done_.load(),
                                        steps_, state_of_out)};
}

}  // namespace wh
