// How far a run is, and whether the caller wants it to stop. Shared by all workers of a run.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

#include "core/status.h"

namespace wh {

class Progress {
 public:
  // Reports the fraction done, 0..1; anything but 0 cancels. Never called by two threads at once.
  using Callback = int32_t (*)(void* context, double fraction);

  Progress() = default;
  Progress(Callback callback, void* context) : callback_(callback), context_(context) {}

  // A run has `steps` pieces, each done in one go.
  void start(int64_t steps) { steps_ = steps; }

  // Workers call it between two steps; false: stop.
  bool step_done() {
    const int64_t done = ++done_;
    if (callback_ == nullptr) return true;
    // A worker that finds another one reporting goes on: the next report will count its step.
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock.owns_lock() && !is_cancelled_) {
      const double fraction = static_cast<double>(done) / static_cast<double>(steps_);
      if (callback_(context_, fraction < 1 ? fraction : 1) != 0) is_cancelled_ = true;
    }
    return !is_cancelled_;
  }
  bool is_cancelled() const { return is_cancelled_; }
  bool is_watched() const { return callback_ != nullptr; }

  // kCancelled, with how far it came and what is in out, or ok.
  Status status(const char* state_of_out) const;

 private:
  Callback callback_ = nullptr;
  void* context_ = nullptr;
  int64_t steps_ = 1;
  std::atomic<int64_t> done_{0};
  std::atomic<bool> is_cancelled_{false};
  std::mutex mutex_;
};

}  // namespace wh
