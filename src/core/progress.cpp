#include "core/progress.h"

#include <fmt/format.h>

namespace wh {

void Progress::report() {
  reported_ = done_;  // read under the mutex, so that a slow worker cannot report an older value
  const double fraction = static_cast<double>(reported_) / static_cast<double>(work_);
  if (callback_(context_, fraction) != 0 && reported_ < work_) is_cancelled_ = true;
}

Status Progress::finish() {
  if (callback_ == nullptr) return {};
  if (is_cancelled_ && done_ < work_) {
    return {
        Code::kCancelled,
        fmt::format("cancelled at {} %; {} {}",
                    static_cast<int>(100 * static_cast<double>(done_) / static_cast<double>(work_)),
                    results_are_, is_writing_ ? "partly written" : "untouched")};
  }
  if (!is_cancelled_ && reported_ < work_) report();
  return {};
}

}  // namespace wh
