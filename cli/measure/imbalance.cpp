#include "measure/imbalance.h"

#include <algorithm>
#include <chrono>
#include <vector>

namespace wh::cli {
namespace {

using Clock = std::chrono::steady_clock;

// The default executor with a stopwatch around every task.
class TimedExecutor {
 public:
  Executor executor() { return {&TimedExecutor::parallel, this}; }
  double imbalance() const { return mean_s_ > 0 ? largest_s_ / mean_s_ - 1 : 0; }

 private:
  struct Call {
    Executor::Task task;
    void* argument;
    std::vector<double> seconds;
  };

  static void parallel(void* context, int32_t count, Executor::Task task, void* argument) {
    auto* self = static_cast<TimedExecutor*>(context);
    Call call{task, argument, std::vector<double>(static_cast<size_t>(count))};
    const Executor& inner = default_executor();
    inner.parallel(
        inner.context, count,
        [](void* opaque, int32_t i) {
          auto* timed = static_cast<Call*>(opaque);
          const Clock::time_point begin = Clock::now();
          timed->task(timed->argument, i);
          timed->seconds[static_cast<size_t>(i)] =
              std::chrono::duration<double>(Clock::now() - begin).count();
        },
        &call);
    double sum = 0, largest = 0;
    for (const double seconds : call.seconds) {
      sum += seconds;
      largest = std::max(largest, seconds);
    }
    self->largest_s_ += largest;
    self->mean_s_ += sum / count;
  }

  double largest_s_ = 0, mean_s_ = 0;
};

}  // namespace

Result<double> imbalance(Execution& execution) {
  constexpr int kRuns = 3;
  double least = 0;
  for (int i = 0; i < kRuns; ++i) {
    TimedExecutor timed;
    if (Status status = execution.run({.executor = timed.executor()}); !status.ok()) {
      return status;
    }
    least = i == 0 ? timed.imbalance() : std::min(least, timed.imbalance());
  }
  return least;
}

}  // namespace wh::cli
