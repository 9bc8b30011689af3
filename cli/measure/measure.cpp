#include "measure/measure.h"

#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <ctime>
#include <limits>
#include <thread>

#include "cpu/cpu_facts.h"
#include "measure/probe.h"

namespace wh::cli {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kProbeUs = 300;
constexpr double kLeastShare = 0.85;
// Timer interrupts and daemons take a core for microseconds, some times a second.
constexpr double kUsAPreemption = 20e3;
// Share of the CPU time that the best sample of the same run had: a neighbour on one of two cores
// takes a quarter of it.
constexpr double kLeastCpuShare = 0.97;
// Share of as many single threads. Many cores at once clock lower than one; two on one core reach
// half.
constexpr double kLeastScaling = 0.8;

double us_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
}

int64_t preemptions() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_nivcsw;
}

double cpu_us() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) * 1e6 + static_cast<double>(time.tv_nsec) * 1e-3;
}

struct Sample {
  double us = 0;
  double gflops = 0;     // the lower of the probes before and after
  double cpu_share = 0;  // CPU time of all threads over wall time
  bool was_preempted = false;
};

// A run with what was seen of it.
struct Track {
  const Run* run;
  std::vector<Sample> taken;
  bool is_done = false;

  double best_us() const {
    double best = std::numeric_limits<double>::infinity();
    for (const Sample& sample : taken) best = std::min(best, sample.us);
    return best;
  }
  bool is_kept(const Sample& sample, const Guard& guard) const {
    if (!guard.is_on()) return true;
    if (sample.was_preempted || !guard.is_quiet(sample.gflops)) return false;
    if (sample.us < kUsAPreemption) return true;
    double most = 0;
    for (const Sample& other : taken) most = std::max(most, other.cpu_share);
    return sample.cpu_share >= kLeastCpuShare * most;
  }
  int64_t kept(const Guard& guard) const {
    return std::count_if(taken.begin(), taken.end(),
                         [&](const Sample& sample) { return is_kept(sample, guard); });
  }
  Samples summary(const Guard& guard) const {
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
};

class Measurement {
 public:
  Measurement(const std::vector<Run>& runs, Guard& guard, const MeasureOptions& options)
      : guard_(guard), options_(options), before_(guard.probe()) {
    for (const Run& run : runs) tracks_.push_back({&run, {}});
  }

  Status warm_up() {
    for (Track& track : tracks_) {
      Sample sample;
      if (Status status = take(by_the_wall(track.run->call), sample); !status.ok()) return status;
      if (Status status = track.run->after_warm_up(); !status.ok()) return status;
      before_ = guard_.probe();
      if (sample.us <= options_.seconds * 1e6 / 2 || track.run->timed) continue;
      track.taken.push_back(sample);
      track.is_done = true;
    }
    return {};
  }

  // Disturbed moments pass; a machine that is never quiet gets three times the rounds.
  Status sample() {
    Clock::time_point begin = Clock::now();
    for (int64_t round = 0; round < 3 * options_.samples; ++round) {
      bool all_done = true;
      for (Track& track : tracks_) {
        if (track.is_done) continue;
        all_done = false;
        Sample sample;
        if (Status status =
                take(track.run->timed ? track.run->timed : by_the_wall(track.run->call), sample);
            !status.ok()) {
          return status;
        }
        track.taken.push_back(sample);
        track.is_done = track.kept(guard_) >= options_.samples;
      }
      if (all_done) break;
      if (round == 0 && options_.drop_over > 0) {
        for (Track& track : tracks_) {
          track.is_done = track.is_done || track.best_us() > options_.drop_over * fastest_us();
        }
        begin = Clock::now();  // what rests from now on has taken nobody's time
      }
      const double seconds = us_since(begin) * 1e-6;
      if (seconds > 3 * options_.seconds || (seconds > options_.seconds && is_enough())) break;
    }
    return {};
  }

  std::vector<Samples> summaries() const {
    std::vector<Samples> summaries;
    for (const Track& track : tracks_) summaries.push_back(track.summary(guard_));
    return summaries;
  }

 private:
  using Timed = std::function<Result<double>()>;

  static Timed by_the_wall(const std::function<Status()>& call) {
    return [&call]() -> Result<double> {
      const Clock::time_point start = Clock::now();
      if (Status status = call(); !status.ok()) return status;
      return us_since(start);
    };
  }

  Status take(const Timed& timed, Sample& sample) {
    if (!guard_.is_quiet(before_)) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
      before_ = guard_.probe();
    }
    const int64_t preempted = preemptions();
    const double cpu = cpu_us();
    const Result<double> us = timed();
    if (!us.ok()) return us.status();
    sample.us = *us;
    sample.cpu_share = (cpu_us() - cpu) / sample.us;
    const auto harmless = static_cast<int64_t>(sample.us / kUsAPreemption);
    sample.was_preempted = preemptions() - preempted > harmless;
    const double after = guard_.probe();
    sample.gflops = std::min(before_, after);
    before_ = after;
    return {};
  }

  double fastest_us() const {
    double fastest = std::numeric_limits<double>::infinity();
    for (const Track& track : tracks_) fastest = std::min(fastest, track.best_us());
    return fastest;
  }

  bool is_enough() const {
    std::vector<const Track*> order;
    for (const Track& track : tracks_) order.push_back(&track);
    std::sort(order.begin(), order.end(),
              [](const Track* a, const Track* b) { return a->best_us() < b->best_us(); });
    for (size_t i = 0; i < std::min<size_t>(2, order.size()); ++i) {
      if (!order[i]->is_done && order[i]->kept(guard_) < options_.least_of_fastest) return false;
    }
    return true;
  }

  Guard& guard_;
  const MeasureOptions& options_;
  std::vector<Track> tracks_;
  double before_;  // the last probe
};

}  // namespace

Guard::Guard(int32_t threads) : threads_(std::min(threads, cpu_facts().cores)) {
  if (threads_ == 0) return;
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

std::string Guard::warning() const {
  if (peak_gflops_ >= kLeastScaling * threads_ * one_thread_gflops_) return "";
  return fmt::format(
      "{} threads reach {:.0f} GFLOP/s where one reaches {:.0f}: they share cores, and so does "
      "what "
      "is measured",
      threads_, peak_gflops_, one_thread_gflops_);
}

Result<std::vector<Samples>> measure(const std::vector<Run>& runs, Guard& guard,
                                     const MeasureOptions& options) {
  Measurement measurement(runs, guard, options);
  if (Status status = measurement.warm_up(); !status.ok()) return status;
  if (Status status = measurement.sample(); !status.ok()) return status;
  return measurement.summaries();
}

}  // namespace wh::cli
