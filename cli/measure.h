// Times runs side by side, and throws away samples that something else disturbed.
//
// Before each sample a short probe of multiply-adds runs on all threads; a sample after a probe
// under 85 % of the best seen at the start is dropped, and so is one in which the kernel preempted
// us (ru_nivcsw moved): two virtual cores are sometimes one physical core.
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
  int64_t samples = 9;
  double seconds = 20;  // stop taking more after this long, with at least one of each
};

class Guard {
 public:
  explicit Guard(int32_t threads);

  double peak_gflops() const { return peak_gflops_; }
  // Whether all threads have their speed right now.
  bool is_quiet() const;

 private:
  int32_t threads_;
  double peak_gflops_ = 0;
};

using Run = std::function<Status()>;

// Alternates between the runs, one warm-up of each first. Fails with a run's own status.
Result<std::vector<Samples>> measure(const std::vector<Run>& runs, const Guard& guard,
                                     const MeasureOptions& options);

}  // namespace wh::cli
