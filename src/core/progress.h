// How far a run is, whether the caller wants it to stop, and whether it has begun to write out.
// Shared by all workers of a run.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

#include "core/status.h"

namespace wh {

class Progress {
 public:
  // Reports the fraction done, which never falls and ends at 1; anything but 0 cancels, unless
  // nothing is left to do. Never called by two threads at once.
  using Callback = int32_t (*)(void* context, double fraction);

  Progress() = default;
  Progress(Callback callback, void* context) : callback_(callback), context_(context) {}

  // A run is so much work, in a unit of the kernel's choice, done in steps. `results_are` begins
  // what a cancelled run says of them.
  void start(int64_t work, const char* results_are = "out is") {
    work_ = work;
    results_are_ = results_are;
  }

  // Workers call it between two steps, with the work of the last; false: stop.
  bool step_done(int64_t work = 1) {
    if (callback_ == nullptr) return true;
    done_ += work;
    // A worker that finds another one reporting goes on: the next report will count its step.
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock.owns_lock() && !is_cancelled_) {
      report();
    }
    return !is_cancelled_;
  }
  // Work that is not worth a look at the callback.
  void add(int64_t work) {
    if (callback_ != nullptr) done_ += work;
  }
  bool is_cancelled() const { return is_cancelled_; }
  bool is_watched() const { return callback_ != nullptr; }

  // Before a row of the results is stored.
  void writing_out() { is_writing_.store(true, std::memory_order_relaxed); }

  // When all workers are back. kCancelled, with how far the run came and what is in the results; ok
  // when everything was done, even if the caller asked to stop meanwhile.
  Status finish();

 private:
  void report();

  Callback callback_ = nullptr;
  void* context_ = nullptr;
  int64_t work_ = 1;
  const char* results_are_ = "out is";
  std::atomic<int64_t> done_{0};
  std::atomic<bool> is_cancelled_{false};
  std::atomic<bool> is_writing_{false};
  std::mutex mutex_;
  int64_t reported_ = 0;  // under the mutex
};

}  // namespace wh
