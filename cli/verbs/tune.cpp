// widehead tune: measures what the kernels cost here, for the planner's estimates.
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>

#include "api/machine.h"
#include "api/profile_store.h"
#include "cpu/cpu_facts.h"
#include "input/number_flag.h"
#include "input/parallel_flags.h"
#include "input/problem_flags.h"
#include "measure/measure.h"
#include "parallel/stored_link.h"
#include "plan/planner.h"
#include "report/session.h"
#include "verify/execution.h"

namespace wh::cli {
namespace {

struct TuneFlags {
  std::string device;
  double seconds = 50;
  bool show = false, json = false;
  std::string parallel;
  ParallelFlags ranks;
};

// Held while tuning: two processes at once would measure each other.
class TuneLock {
 public:
  explicit TuneLock(const std::filesystem::path& profile) {
    std::error_code error;
    std::filesystem::create_directories(profile.parent_path(), error);
    const std::string path = profile.string() + ".lock";
    file_ = open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    if (file_ < 0) reason_ = std::strerror(errno);
    is_held_ = file_ >= 0 && flock(file_, LOCK_EX | LOCK_NB) == 0;
  }
  ~TuneLock() {
    if (file_ >= 0) close(file_);
  }
  TuneLock(const TuneLock&) = delete;
  TuneLock& operator=(const TuneLock&) = delete;

  Status status(const std::filesystem::path& profile) const {
    if (file_ < 0) {
      return {Code::kInternal,
              fmt::format("cannot write in {}: {}; set XDG_CACHE_HOME to a folder that can be "
                          "written",
                          profile.parent_path().string(), reason_)};
    }
    if (!is_held_) {
      return {Code::kInternal, "another widehead tune is running; wait for it, or stop it"};
    }
    return {};
  }

 private:
  int file_;
  std::string reason_;  // why it could not be opened
  bool is_held_ = false;
};

// The shapes that are measured.
std::vector<Request> tuning_grid(Device device, int32_t device_index) {
  std::vector<Request> grid;
  const auto add = [&](const std::string& heads, int64_t dim, int64_t queries, int64_t keys,
                       const char* dtype) {
    ProblemFlags flags;
    flags.heads = heads;
    flags.dim = std::to_string(dim);
    flags.queries = std::to_string(queries);
    flags.keys = std::to_string(keys);
    flags.dtype = dtype;
    if (queries > 1) flags.causal = "bottom-right";
    flags.device = device_name(device, device_index);
    auto requests = read_requests(flags);
    if (requests.ok()) grid.push_back(std::move(requests->front()));
  };
  // Interpolation crosses types more easily than lengths or widths: an early stop should leave out
  // the last type.
  for (const char* dtype : {"f16", "f32", "bf16"}) {
    for (const int64_t keys : {16, 64, 256, 512, 1024, 4096, 32768}) {
      for (const int64_t dim : {64, 128, 256, 512}) {
        for (const char* heads : {"8/8", "8/2"}) {
          if (keys <= 1024) add(heads, dim, keys, keys, dtype);
          add(heads, dim, 1, keys, dtype);
        }
        if (keys < 256 || keys > 4096) continue;
        for (const int64_t queries : {16, 128}) add("8/2", dim, queries, keys, dtype);
      }
    }
  }
  return grid;
}

class Tuner {
 public:
  Tuner(Device device, int32_t device_index, double seconds)
      : device_(device),
        device_index_(device_index),
        seconds_(seconds),
        guard_(backend(device).is_host() ? cpu_facts().cores : 0),
        profile_(this_identity(device, device_index), today()) {}

  // Fills the profile until done, out of time or interrupted.
  Status run() {
    const std::vector<Request> grid = tuning_grid(device_, device_index_);
    ProgressLine line(true);
    const auto begin = std::chrono::steady_clock::now();
    for (size_t i = 0; i < grid.size() && !is_interrupted(); ++i) {
      const double elapsed =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      if (elapsed > seconds_) break;
      line.show(fmt::format("{} {:2.0f} s  {}", progress_bar(elapsed, seconds_), elapsed,
                            grid[i].name()));
      if (Status status = measure_one(grid[i]); !status.ok()) return status;
    }
    return {};
  }

  // The costs of `old` at shapes that this run did not reach.
  void add_missing(const Profile& old) {
    const auto measured = profile_.points();
    for (const auto& [kernel, points] : old.points()) {
      for (const CostPoint& point : points) {
        const auto found = measured.find(kernel);
        const bool is_known = found != measured.end() &&
                              std::any_of(found->second.begin(), found->second.end(),
                                          [&](const CostPoint& one) { return one.at == point.at; });
        if (!is_known) profile_.add(kernel, point);
      }
    }
  }

  const Profile& profile() const { return profile_; }
  int64_t points() const { return points_; }
  int64_t disturbed() const { return disturbed_; }  // of the points

 private:
  Status measure_one(const Request& request) {
    const Problem& p = request.problem;
    // Without a profile the estimates are the formulas themselves.
    Machine machine = this_machine(device_, device_index_);
    machine.profile = nullptr;
    const Result<Plan> plan = make_plan(p, {}, machine);
    if (!plan.ok()) return plan.status();
    const HostTensors tensors(request.input(1));
    for (const Candidate& candidate : plan->candidates) {
      // What takes long here takes a known multiple of what was measured on smaller shapes. The
      // oracle can be the fastest on the smallest alone.
      const double longest_us =
          find_kernel(machine.kernels, candidate.kernel)->role == Role::kReference ? 200 : 1e5;
      if (candidate.verdict == Verdict::kRefused || candidate.estimated_us > longest_us) continue;
      Limits forced;
      forced.kernel = candidate.kernel;
      Result<Execution> execution = Execution::prepare(p, forced, tensors.tensors());
      if (!execution.ok()) continue;
      const Run run{.call = [&] { return execution->run(); }, .timed = execution->device_clock()};
      auto samples = measure({run}, guard_, {5, 0.1});
      if (!samples.ok()) return samples.status();
      if (!(*samples)[0].is_guarded) ++disturbed_;
      const double ratio = (*samples)[0].best() / candidate.estimated_us;
      profile_.add(candidate.kernel, {CostFeatures::of(p), static_cast<float>(std::log2(ratio))});
      ++points_;
    }
    return {};
  }

  Device device_;
  int32_t device_index_;
  double seconds_;
  Guard guard_;
  Profile profile_;
  int64_t points_ = 0, disturbed_ = 0;
};

// The stored profile; one that is not used here is an error, and says why.
int show(const std::filesystem::path& path, Device device, int32_t device_index) {
  std::error_code error;
  if (!std::filesystem::exists(path, error)) {
    return report(invalid(
        fmt::format("no profile at {}{}; `widehead tune` measures one, until then plans use: {}",
                    path.string(), error ? " (" + error.message() + ")" : "",
                    loaded_profile(device, device_index).description)));
  }
  const Result<Profile> profile = read_profile(path);
  if (!profile.ok()) return report(profile.status());
  const std::string stale = difference(profile->identity(), this_identity(device, device_index));
  if (!stale.empty()) {
    return report(invalid(fmt::format("{} is ignored here: {}", path.string(), stale)));
  }
  fmt::print("{}", profile->to_json());
  fmt::print(stderr, "{}\n", path.string());
  return kFine;
}

int run_tune(const TuneFlags& flags) {
  ProblemFlags problem;
  problem.device = flags.device;
  problem.heads = problem.dim = problem.queries = "1";
  const auto requests = read_requests(problem);
  if (!requests.ok()) return report(requests.status());
  const Device device = requests->front().problem.device;
  const int32_t index = requests->front().problem.device_index;
  if (!flags.parallel.empty()) {
    return tune_link({*kTransports.value(flags.parallel), flags.ranks.ranks, device, index},
                     flags.json);
  }
  if (Status status = refuse_parallel_flags(flags.ranks, "--parallel"); !status.ok()) {
    return report(status);
  }
  const std::filesystem::path path = profile_path(device, index);
  if (path.empty()) {
    return report(invalid("neither XDG_CACHE_HOME nor HOME says where profiles belong"));
  }
  if (flags.show) return show(path, device, index);
  const DeviceFacts& facts = backend(device).facts(index);
  if (!facts.unavailable.empty()) return report({Code::kRefused, facts.unavailable});
  const TuneLock lock(path);
  if (Status status = lock.status(path); !status.ok()) return report(status);
  note_interrupts();
  Tuner tuner(device, index, flags.seconds);
  if (Status status = tuner.run(); !status.ok()) return report(status);
  if (tuner.points() == 0) {
    return report({Code::kCancelled, "stopped before anything was measured"});
  }
  if (tuner.disturbed() > 0) {
    fmt::print(stderr,
               "widehead: {} of {} costs were measured while something else kept the cores busy; "
               "tune again when the machine is quiet\n",
               tuner.disturbed(), tuner.points());
  }
  // What an early stop left out was measured before, if it was measured here.
  if (const Result<Profile> old = read_profile(path);
      is_interrupted() && old.ok() &&
      difference(old->identity(), tuner.profile().identity()).empty()) {
    tuner.add_missing(*old);
  }
  if (Status status = write_profile(path, tuner.profile()); !status.ok()) return report(status);
  if (flags.json) {
    fmt::print("{}", tuner.profile().to_json());
  } else {
    fmt::print("measured {} costs{}; plans use them from now on: {}\n", tuner.points(),
               is_interrupted() ? " before the interrupt" : "", path.string());
  }
  return kFine;
}

}  // namespace

void add_tune(CLI::App& app, Action& action) {
  auto flags = std::make_shared<TuneFlags>();
  CLI::App* verb = app.add_subcommand("tune", "Measure this device, so that plans estimate better");
  verb->add_option("--device", flags->device, "cpu or cuda:N (cpu)");
  add_number_flag(*verb, "--seconds", flags->seconds, kSeconds, "stop after this long (50)");
  verb->add_flag("--show", flags->show, "print the stored profile instead");
  verb->add_flag("--json", flags->json, "print the new profile, or the link, as JSON");
  add_transport_flag(*verb, flags->parallel);
  add_ranks_flag(*verb, flags->ranks,
                 "measure what connects so many ranks, and nothing else (mpirun's, or every CUDA "
                 "device)");
  verb->callback([flags, &action] { action = [flags] { return run_tune(*flags); }; });
}

}  // namespace wh::cli
