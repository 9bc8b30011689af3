#include "measure.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>

#include "probe.h"

namespace wh::cli {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kProbeUs = 300;
constexpr double kLeastShare = 0.85;

double us_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
}

int64_t preemptions() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_nivcsw;
}

}  // namespace

Guard::Guard(int32_t threads) : threads_(threads) {
  for (int i = 0; i < 40; ++i) {
    peak_gflops_ = std::max(peak_gflops_, multiply_add_gflops(threads_, kProbeUs));
  }
}

bool Guard::is_quiet() const {
  return multiply_add_gflops(threads_, kProbeUs) >= kLeastShare * peak_gflops_;
}

Result<std::vector<Samples>> measure(const std::vector<Run>& runs, const Guard& guard,
                                     const MeasureOptions& options) {
  const Clock::time_point begin = Clock::now();
  std::vector<Samples> kept(runs.size()), disturbed(runs.size());
  for (const Run& run : runs) {
    if (Status status = run(); !status.ok()) return status;
  }
  for (int64_t round = 0; round < options.samples; ++round) {
    for (size_t i = 0; i < runs.size(); ++i) {
      // A disturbed moment passes: a few tries, then the sample counts as disturbed.
      for (int attempt = 0; attempt < 3; ++attempt) {
        const bool was_quiet = guard.is_quiet();
        const int64_t preempted = preemptions();
        const Clock::time_point start = Clock::now();
        if (Status status = runs[i](); !status.ok()) return status;
        const double us = us_since(start);
        const bool is_kept = was_quiet && preemptions() == preempted;
        (is_kept ? kept : disturbed)[i].us.push_back(us);
        if (is_kept || us > 1e6) break;
      }
    }
    if (us_since(begin) > options.seconds * 1e6) break;
  }
  for (size_t i = 0; i < runs.size(); ++i) {
    const auto dropped = static_cast<int64_t>(disturbed[i].us.size());
    if (kept[i].us.empty()) {
      kept[i] = disturbed[i];
      kept[i].is_guarded = false;
    } else {
      kept[i].dropped = dropped;
    }
    std::sort(kept[i].us.begin(), kept[i].us.end());
  }
  return kept;
}

}  // namespace wh::cli
