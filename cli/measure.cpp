#include "measure.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <thread>

#include "probe.h"

namespace wh::cli {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kProbeUs = 300;
constexpr double kLeastShare = 0.85;
// Timer interrupts and daemons take a core for microseconds, some times a second.
constexpr double kUsAPreemption = 10e3;

double us_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
}

int64_t preemptions() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_nivcsw;
}

struct Sample {
  double us;
  double gflops;  // the lower of the probes before and after
  bool was_preempted;
};

bool is_kept(const Sample& sample, const Guard& guard) {
  return !sample.was_preempted && guard.is_quiet(sample.gflops);
}

Samples summary(const std::vector<Sample>& taken, const Guard& guard) {
  Samples kept, disturbed;
  for (const Sample& sample : taken) {
    (is_kept(sample, guard) ? kept : disturbed).us.push_back(sample.us);
  }
  Samples& shown = kept.us.empty() ? disturbed : kept;
  shown.dropped = static_cast<int64_t>(taken.size() - kept.us.size());
  shown.is_guarded = !kept.us.empty();
  std::sort(shown.us.begin(), shown.us.end());
  return shown;
}

}  // namespace

Guard::Guard(int32_t threads) : threads_(threads) {
  if (threads == 0) return;
  // Spread over a second: a spell in which two cores are one may last as long as a burst of probes.
  for (int i = 0; i < 100; ++i) {
    probe();
    if (i % 5 == 0) {
      one_thread_gflops_ = std::max(one_thread_gflops_, multiply_add_gflops(1, kProbeUs));
      std::this_thread::sleep_for(std::chrono::milliseconds(40));
    }
  }
}

double Guard::probe() {
  if (threads_ == 0) return 0;
  const double gflops = multiply_add_gflops(threads_, kProbeUs);
  peak_gflops_ = std::max(peak_gflops_, gflops);
  return gflops;
}

bool Guard::is_quiet(double gflops) const { return gflops >= kLeastShare * peak_gflops_; }

Result<std::vector<Samples>> measure(const std::vector<Run>& runs, Guard& guard,
                                     const MeasureOptions& options) {
  const Clock::time_point begin = Clock::now();
  for (const Run& run : runs) {
    if (Status status = run(); !status.ok()) return status;
  }
  std::vector<std::vector<Sample>> taken(runs.size());
  std::vector<bool> rests(runs.size());
  const auto kept = [&](size_t i) {
    return std::count_if(taken[i].begin(), taken[i].end(),
                         [&](const Sample& sample) { return is_kept(sample, guard); });
  };
  const auto is_done = [&](size_t i) { return rests[i] || kept(i) >= options.samples; };
  double before = guard.probe();
  // Disturbed moments pass; a machine that is never quiet gets three times the rounds.
  for (int64_t round = 0; round < 3 * options.samples; ++round) {
    bool all_done = true;
    for (size_t i = 0; i < runs.size(); ++i) {
      if (is_done(i)) continue;
      all_done = false;
      if (!guard.is_quiet(before)) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
        before = guard.probe();
      }
      const int64_t preempted = preemptions();
      const Clock::time_point start = Clock::now();
      if (Status status = runs[i](); !status.ok()) return status;
      const double us = us_since(start);
      const int64_t harmless = static_cast<int64_t>(us / kUsAPreemption);
      const bool was_preempted = preemptions() - preempted > harmless;
      const double after = guard.probe();
      taken[i].push_back({us, std::min(before, after), was_preempted});
      before = after;
    }
    if (all_done || us_since(begin) > options.seconds * 1e6) break;
    if (round > 0 || options.drop_over == 0) continue;
    double fastest = std::numeric_limits<double>::infinity();
    for (const auto& samples : taken) fastest = std::min(fastest, samples.front().us);
    for (size_t i = 0; i < runs.size(); ++i) {
      rests[i] = taken[i].front().us > options.drop_over * fastest;
    }
  }
  std::vector<Samples> summaries;
  for (const auto& samples : taken) summaries.push_back(summary(samples, guard));
  return summaries;
}

}  // namespace wh::cli
