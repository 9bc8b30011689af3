// Times runs side by side, and throws away samples that something else disturbed: two virtual cores
// are sometimes one physical core, and a neighbour's work costs 20 to 50 %.
//
// A short probe of multiply-adds runs on all threads before and after each sample. A sample is
// disturbed when either probe stays under 85 % of the highest rate seen in the whole run, when the
// kernel preempted us (ru_nivcsw moved; a long sample meets a few harmless preemptions), or when a
// long one had less CPU time for its length than others of the same run.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "core/status.h"

namespace wh::cli {

struct Samples {
  std::vector<double> us;  // sorted; the kept ones
  int64_t dropped = 0;
  bool is_guarded = true;  // false: nothing undisturbed was seen, these are the disturbed ones

  double best() const { return us.empty() ? 0 : us.front(); }
  double median() const { return us.empty() ? 0 : us[us.size() / 2]; }
};

struct MeasureOptions {
  int64_t samples = 9;  // undisturbed ones, where there is time
  double seconds = 20;  // stop taking more after this long, with at least one of each
  // After the first round a run slower than the fastest by more than this factor rests; 0: never.
  double drop_over = 0;
  // Undisturbed samples of the two fastest that are waited for, up to three times `seconds`.
  int64_t least_of_fastest = 1;
};

class Guard {
 public:
  // Probes for a second. threads 0: there is nothing to guard, as the work is another device's.
  explicit Guard(int32_t threads);

  // All threads together: the highest rate seen so far.
  double peak_gflops() const { return peak_gflops_; }
  double one_thread_gflops() const { return one_thread_gflops_; }
  // That all threads together never reached what their number promises; empty: they did.
  std::string warning() const;

  // The rate of all threads right now. A higher one than before is the new peak.
  double probe();
  bool is_on() const { return threads_ > 0; }
  bool is_quiet(double gflops) const;

 private:
  int32_t threads_;
  double peak_gflops_ = 0, one_thread_gflops_ = 0;
};

struct Run {
  std::function<Status()> call;
  std::function<Status()> after_warm_up = [] { return Status(); };  // not timed
  // Runs and answers how long that took in microseconds; empty: `call` by the wall's clock.
  std::function<Result<double>()> timed = nullptr;
};

// Alternates between the runs, one warm-up of each first, by the wall's clock; a warm-up that takes
// more than half of `seconds` is the only sample, but not of a run with a clock of its own, whose
// first call loads code. Fails with a run's own status.
Result<std::vector<Samples>> measure(const std::vector<Run>& runs, Guard& guard,
                                     const MeasureOptions& options);

}  // namespace wh::cli
