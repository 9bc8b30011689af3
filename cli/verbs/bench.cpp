// widehead bench: kernels side by side on a suite or one problem.
#include <dlfcn.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <fstream>
#include <memory>
#include <new>
#include <optional>

#include "api/environment.h"
#include "api/machine.h"
#include "core/nearest_name.h"
#include "cpu/cpu_facts.h"
#include "input/limits_flags.h"
#include "input/number_flag.h"
#include "measure/imbalance.h"
#include "measure/probe.h"
#include "measure/request_data.h"
#include "measure/useful_work.h"
#include "plan/planner.h"
#include "plan/units.h"
#include "report/bench_result.h"
#include "report/session.h"
#include "verify/execution.h"

namespace wh::cli {
namespace {

struct BenchFlags {
  std::string suite, against, csv, svg;
  ProblemFlags problem;
  LimitsFlags limits;
  int64_t samples = 9;
  double seconds = 20, skip_over = 120;
  bool json = false;
};

// A run longer than this is not repeated for the workers' times.
constexpr double kLongestImbalanceUs = 3e6;
constexpr double kInterruptibleUs = 1e6;
// So many times the fastest's time, a kernel is not the fastest by any slip of a clock.
constexpr double kNoRivalOver = 3;

// OpenBLAS chooses kernels by the CPU that it finds, and not always the best: which ones it took is
// part of any comparison with it.
std::string blas_name() {
  if (!cpu_facts().has_cblas) return "none";
  using Name = const char* (*)();
  const auto core = reinterpret_cast<Name>(dlsym(RTLD_DEFAULT, "openblas_get_corename"));
  const auto config = reinterpret_cast<Name>(dlsym(RTLD_DEFAULT, "openblas_get_config"));
  if (core == nullptr || config == nullptr) return "a CBLAS that does not say which";
  return fmt::format("{}; kernels for {}", config(), core());
}

BenchDevice describe_device(const Problem& p, int32_t threads, const Guard& guard) {
  BenchDevice device;
  const Backend& kind = backend(p.device);
  const ProfileIdentity identity = kind.identity(p.device_index);
  device.name = identity.device;
  device.isa = identity.isa;
  device.threads = identity.threads;
  if (!kind.is_host()) {
    const DeviceFacts& facts = kind.facts(p.device_index);
    device.peak_gflops = facts.tensor_tflops * 1e3;
    device.read_gbytes_per_s = facts.read_gbytes_per_s;
    device.last_level_cache_bytes = facts.l2_bytes;
    return device;
  }
  device.threads = threads;
  device.peak_gflops = guard.peak_gflops();
  device.one_thread_gflops = guard.one_thread_gflops();
  device.bf16_gflops = bf16_gflops(threads);
  device.read_gbytes_per_s = read_gbytes_per_s(threads);
  device.last_level_cache_bytes = last_level_cache_bytes();
  device.blas = blas_name();
  device.warning = guard.warning();
  return device;
}

// Kernels to stand beside the planner's choice, by name, or "fused" and "unfused" for whatever
// they are on the device and problem.
Result<std::vector<std::string>> read_against(const std::string& list, const Problem& p) {
  std::vector<const Kernel*> kernels;
  std::vector<std::string> all, names;
  for (const Kernel* kernel : kernels_of(p.device)) {
    if (kernel->pass != p.pass) continue;
    kernels.push_back(kernel);
    all.push_back(kernel->name);
  }
  for (size_t begin = 0; begin < list.size();) {
    const size_t end = std::min(list.find(',', begin), list.size());
    std::string name = list.substr(begin, end - begin);
    for (const Kernel* kernel : kernels) {
      if (name == "unfused" && kernel->role == Role::kBaseline) name = kernel->name;
    }
    if (name != "fused" && std::find(all.begin(), all.end(), name) == all.end()) {
      return invalid(fmt::format("--against names \"{}\"; did you mean \"{}\"?", name,
                                 nearest_name(name, all)));
    }
    names.push_back(std::move(name));
    begin = end + 1;
  }
  return names;
}

// A kernel that runs on a problem's tensors.
struct Contestant {
  Execution execution;
  size_t row;  // in BenchResult::rows
  double relative_rms;
};

class Bench {
 public:
  Bench(const BenchFlags& flags, const Limits& limits, std::vector<Request> requests,
        std::vector<std::string> against)
      : flags_(flags),
        limits_(limits),
        requests_(std::move(requests)),
        against_(std::move(against)),
        is_host_(backend(requests_.front().problem.device).is_host()),
        guard_(is_host_ ? cpu_facts().threads(limits.threads) : 0),
        device_(describe_device(requests_.front().problem, cpu_facts().threads(limits.threads),
                                guard_)) {}

  int run() {
    if (!flags_.json) fmt::print("{}", bench_table_header(device_));
    ProgressLine line(true);
    Status failed;
    for (size_t i = 0; i < requests_.size(); ++i) {
      line.show(fmt::format("{} {} of {}: {}", progress_bar(i, requests_.size()), i + 1,
                            requests_.size(), requests_[i].name()));
      BenchResult result{requests_[i], "", "", {}, 0};
      const Status status = bench_one(result);
      line.show("");
      if (is_interrupted()) {
        failed = {Code::kCancelled, "interrupted; the rows so far are whole"};
        report(failed);
        break;
      }
      if (!status.ok()) {
        // The others are worth having all the same.
        failed = status;
        report(Status(failed.code(), requests_[i].name() + ": " + failed.message()));
        if (result.rows.empty()) result.rows.emplace_back().kernel = result.chosen;
        for (BenchRow& row : result.rows) {
          if (row.ran()) row.refusal = failed.message();
        }
      }
      if (is_host_) {  // later probes may have found a higher rate
        device_.peak_gflops = guard_.peak_gflops();
        device_.warning = guard_.warning();
      }
      if (!flags_.json) fmt::print("{}", bench_table(device_, result));
      std::fflush(stdout);
      results_.push_back(std::move(result));
    }
    if (is_host_) {  // a slow moment at the start would make shares of more than all
      device_.read_gbytes_per_s =
          std::max(device_.read_gbytes_per_s, read_gbytes_per_s(device_.threads));
    }
    const Json document = bench_json(flags_.suite, device_, results_);
    if (flags_.json) fmt::print("{}\n", document.dump(2));
    if (flags_.suite == "routing" && !flags_.json) fmt::print("{}", regret_text(results_));
    if (Status status = write_files(document); !status.ok()) return report(status);
    if (!failed.ok()) return exit_code(failed);
    const bool any_ran = std::any_of(results_.begin(), results_.end(), [](const auto& result) {
      return result.fastest() != nullptr;
    });
    return any_ran ? kFine : kNoKernel;
  }

 private:
  Status bench_one(BenchResult& result) try {
    const Problem& p = result.request.problem;
    const Result<Plan> plan = make_plan(p, limits_, this_machine(p.device, p.device_index));
    if (!plan.ok()) return plan.status();
    result.chosen = plan->kernel;
    result.estimates = plan->estimates;
    for (const std::string& kernel : kernels(*plan)) {
      result.rows.push_back(planned_row(*plan, kernel));
    }
    const auto ran = [](const BenchRow& row) { return row.ran(); };
    if (std::none_of(result.rows.begin(), result.rows.end(), ran)) return runnable_status(*plan);
    // Only now: what no kernel takes may have tensors of 100 GB.
    Result<RequestData> data = RequestData::make(result.request, 1);
    if (!data.ok()) return data.status();
    std::vector<Contestant> contestants;
    for (size_t i = 0; i < result.rows.size(); ++i) {
      BenchRow& row = result.rows[i];
      if (!row.ran()) continue;
      Limits forced = limits_;
      forced.kernel = row.kernel;
      forced.policy = Policy::kAutomatic;
      Result<Execution> execution = Execution::prepare(p, forced, data->tensors());
      if (execution.ok()) {
        contestants.push_back({std::move(*execution), i, 0});
      } else {
        row.refusal = execution.status().message();
      }
    }
    return sample(contestants, *data, result);
  } catch (const std::bad_alloc&) {
    return {Code::kOutOfMemory, "not enough memory for its tensors"};
  }

  // The planner's choice, then what is to stand beside it.
  std::vector<std::string> kernels(const Plan& plan) const {
    std::vector<std::string> names;
    const auto add = [&](const std::string& name) {
      if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
    };
    if (plan.runnable()) add(plan.kernel);
    if (flags_.suite == "routing") {
      for (const Candidate& candidate : plan.candidates) add(candidate.kernel);
      return names;
    }
    for (const std::string& name : against_) {
      if (name != "fused") {
        add(name);
      } else if (const std::string fused = fastest_fused(plan); !fused.empty()) {
        add(fused);
      }
    }
    return names;
  }

  static Role role_of(const Plan& plan, const std::string& kernel) {
    return find_kernel(kernels_of(plan.problem.device), kernel)->role;
  }

  // The fused kernel that the planner would take if it had to; empty: none can.
  static std::string fastest_fused(const Plan& plan) {
    const Candidate* fastest = nullptr;
    for (const Candidate& candidate : plan.candidates) {
      if (role_of(plan, candidate.kernel) != Role::kFused || candidate.estimated_us == 0) continue;
      if (candidate.verdict == Verdict::kOverBudget) continue;
      if (fastest == nullptr || candidate.estimated_us < fastest->estimated_us) {
        fastest = &candidate;
      }
    }
    return fastest == nullptr ? "" : fastest->kernel;
  }

  BenchRow planned_row(const Plan& plan, const std::string& kernel) const {
    BenchRow row;
    row.kernel = kernel;
    row.role = role_of(plan, kernel);
    for (const Candidate& candidate : plan.candidates) {
      if (candidate.kernel != kernel) continue;
      row.workspace_bytes = candidate.workspace_bytes;
      row.estimated_us = candidate.estimated_us;
      const bool is_forced = candidate.verdict == Verdict::kRefused && row.estimated_us > 0;
      if ((candidate.verdict == Verdict::kRefused && !is_forced) ||
          candidate.verdict == Verdict::kOverBudget) {
        row.refusal = candidate.reason;
      }
    }
    // The float64 oracle is no rival where it takes seconds.
    const double longest_s = row.role == Role::kReference && kernel != plan.kernel
                                 ? std::min(1.0, flags_.skip_over)
                                 : flags_.skip_over;
    if (row.ran() && row.estimated_us > longest_s * 1e6) {
      row.refusal = fmt::format("skipped: about {}", format_us(row.estimated_us));
    }
    return row;
  }

  Status sample(std::vector<Contestant>& contestants, RequestData& data, BenchResult& result) {
    data.expect();
    std::vector<Run> runs;
    for (Contestant& one : contestants) {
      one.execution.watch_workspace();
      // They share outputs: each answer is looked at before the next one overwrites it.
      const auto look = [&]() -> Status {
        if (Status status = one.execution.fetch_outputs(); !status.ok()) return status;
        one.relative_rms = data.accuracy().relative_rms;
        return {};
      };
      runs.push_back({[&one] { return run(one.execution); }, look, device_clock(one.execution)});
    }
    if (runs.empty()) return {};
    if (Status status = prepare_plain(); !status.ok()) return status;
    if (plain_) {
      runs.push_back({.call = [this] { return plain_->run(); }, .timed = device_clock(*plain_)});
    }
    MeasureOptions options{.samples = flags_.samples, .seconds = flags_.seconds};
    if (flags_.suite == "routing") {
      options.drop_over = kNoRivalOver;
      options.least_of_fastest = 5;
    }
    auto samples = measure(runs, guard_, options);
    if (!samples.ok()) return samples.status();
    if (plain_) {
      result.plain_us_per_gflop = samples->back().best() / (useful_flops(requests_.front()) * 1e-9);
    }
    for (size_t i = 0; i < contestants.size(); ++i) {
      BenchRow& row = result.rows[contestants[i].row];
      row.samples = std::move((*samples)[i]);
      row.relative_rms = contestants[i].relative_rms;
      row.peak_workspace_bytes = contestants[i].execution.peak_workspace_bytes();
      if (!is_host_ || row.kernel != result.chosen || row.samples.best() > kLongestImbalanceUs) {
        continue;
      }
      const Result<double> share = imbalance(contestants[i].execution);
      if (!share.ok()) return share.status();
      row.imbalance = *share;
    }
    return {};
  }

  // A long one can be interrupted. The question would show in the time of a short one.
  static Status run(Execution& execution) {
    if (execution.plan().estimated_us < kInterruptibleUs) return execution.run();
    return execution.run({.progress = [](void*, double) { return int32_t{is_interrupted()}; }});
  }

  // On a GPU a launch from the host takes longer than a short call, and hides which is the faster.
  static std::function<Result<double>()> device_clock(Execution& execution) {
    if (execution.plan().estimated_us >= kInterruptibleUs) return nullptr;
    return execution.device_clock();
  }

  // The suite's first row, where the suite compares with it.
  Status prepare_plain() {
    const auto suite = suites().find(flags_.suite);
    if (plain_ || suite == suites().end() || !suite->value("beside_first_row", false)) return {};
    Result<RequestData> data = RequestData::make(requests_.front(), 1);
    if (!data.ok()) return data.status();
    plain_data_ = std::move(*data);
    Result<Execution> plain =
        Execution::prepare(requests_.front().problem, limits_, plain_data_.tensors());
    if (!plain.ok()) return plain.status();
    plain_.emplace(std::move(*plain));
    return {};
  }

  Status write_files(const Json& document) const {
    const std::pair<std::string, std::string> files[] = {
        {flags_.csv, flags_.csv.empty() ? "" : bench_csv(document)},
        {flags_.svg,
         flags_.svg.empty() ? "" : to_svg(bench_chart(flags_.suite, device_, results_))}};
    for (const auto& [path, text] : files) {
      if (path.empty()) continue;
      std::ofstream file(path);
      file << text;
      file.close();
      if (!file) return invalid("cannot write " + path);
    }
    return {};
  }

  const BenchFlags& flags_;
  const Limits limits_;
  const std::vector<Request> requests_;
  const std::vector<std::string> against_;
  const bool is_host_;
  Guard guard_;
  BenchDevice device_;
  std::vector<BenchResult> results_;
  RequestData plain_data_;
  std::optional<Execution> plain_;
};

int run_bench(const BenchFlags& flags) {
  auto limits = read_limits(flags.limits);
  if (!limits.ok()) return report(limits.status());
  auto requests =
      flags.suite.empty() ? read_requests(flags.problem) : read_suite(flags.suite, flags.problem);
  if (!requests.ok()) return report(requests.status());
  const Problem& p = requests->front().problem;
  if (Status status = apply(environment(), p, *limits); !status.ok()) return report(status);
  const DeviceFacts& facts = backend(p.device).facts(p.device_index);
  if (!facts.unavailable.empty()) return report({Code::kRefused, facts.unavailable});
  const auto suite = suites().find(flags.suite);
  std::string list = flags.against;
  // A suite's own list is of the forward pass's kernels.
  if (list.empty() && suite != suites().end() && p.pass == Pass::kForward) {
    list = suite->value("against", "");
  }
  auto against = read_against(list, p);
  if (!against.ok()) return report(against.status());
  note_interrupts();  // the machine is probed first, for seconds
  return Bench(flags, *limits, std::move(*requests), std::move(*against)).run();
}

}  // namespace

void add_bench(CLI::App& app, Action& action) {
  auto flags = std::make_shared<BenchFlags>();
  CLI::App* verb = app.add_subcommand("bench", "Time kernels side by side on a suite or a problem");
  verb->add_option("suite", flags->suite, "see `list suites`; else give a PROBLEM");
  add_problem_flags(*verb, flags->problem);
  add_limits_flags(*verb, flags->limits);
  verb->add_option("--against", flags->against,
                   "kernels to run beside the planner's choice: A,B, fused, unfused");
  add_number_flag(*verb, "--samples", flags->samples, kCounts,
                  "undisturbed ones of each kernel on each problem (9)");
  add_number_flag(*verb, "--seconds", flags->seconds, kSeconds,
                  "stop sampling a problem after this long (20)");
  add_number_flag(*verb, "--skip-over", flags->skip_over, kSeconds,
                  "skip runs estimated longer, seconds (120)");
  verb->add_option("--csv", flags->csv, "write the rows as CSV");
  verb->add_option("--svg", flags->svg, "draw a chart");
  verb->add_flag("--json", flags->json, "print one JSON document");
  verb->callback([flags, &action] { action = [flags] { return run_bench(*flags); }; });
}

}  // namespace wh::cli
