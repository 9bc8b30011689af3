// widehead run: one problem, from a file or random, timed and compared.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <utility>

#include "api/machine.h"
#include "cpu/cpu_facts.h"
#include "input/limits_flags.h"
#include "input/number_flag.h"
#include "input/parallel_flags.h"
#include "input/planning.h"
#include "input/problem_flags.h"
#include "input/stored_problem.h"
#include "measure/measure.h"
#include "measure/request_data.h"
#include "measure/resident.h"
#include "measure/useful_work.h"
#include "parallel/parallel_run.h"
#include "plan/explain.h"
#include "plan/units.h"
#include "report/session.h"
#include "verify/answer.h"
#include "verify/execution.h"

namespace wh::cli {
namespace {

struct RunFlags {
  std::string file, out;
  ProblemFlags problem;
  LimitsFlags limits;
  std::string parallel;
  ParallelFlags ranks;
  bool every_strategy = false;
  std::optional<uint64_t> seed;
  bool json = false;
};

std::vector<float> floats_of(const StoredTensor& tensor) {
  std::vector<float> floats(tensor.bytes.size() / sizeof(float));
  std::memcpy(floats.data(), tensor.bytes.data(), tensor.bytes.size());  // aligned or not
  return floats;
}

Errors errors_of(const std::vector<float>& have, const std::vector<float>& wanted) {
  Errors errors;
  for (size_t i = 0; i < have.size(); ++i) errors.add(have[i], wanted[i]);
  return errors;
}

Accuracy beside_stored(const Errors& errors, double tolerance) {
  return {.relative_rms = errors.relative_rms(),
          .largest = errors.largest(),
          .tolerance = tolerance,
          .reference = "the stored answer"};
}

// The first run: shown on a terminal, and measured for what the later ones do not tell.
struct FirstRun {
  double us = 0;
  double longest_step_us = 0;        // between two looks at the progress, the begin and the end
  uint64_t peak_resident_bytes = 0;  // of the process
};

Result<FirstRun> run_watched(Execution& execution) {
  using Clock = std::chrono::steady_clock;
  struct Watch {
    RunProgress progress;
    Clock::time_point begin = Clock::now(), last = begin;
    double longest_us = 0;

    static double us(Clock::duration duration) {
      return std::chrono::duration<double, std::micro>(duration).count();
    }
    void look() {
      const auto now = Clock::now();
      longest_us = std::max(longest_us, us(now - last));
      last = now;
    }
  };
  restart_peak();
  Watch watch;
  const auto look = [](void* context, double fraction) {
    auto& self = *static_cast<Watch*>(context);
    self.look();
    return RunProgress::report(&self.progress, fraction);
  };
  const Status status = execution.run({.progress = look, .progress_context = &watch});
  watch.look();
  if (!status.ok()) return status;
  return FirstRun{Watch::us(watch.last - watch.begin), watch.longest_us, peak_resident_bytes()};
}

// Runs something small on the kernel that the problem will take: threads start with their first
// call, and libraries allocate what they keep.
Status warm_up(const Plan& plan) {
  if (!backend(plan.problem.device).is_host()) return {};
  Request small;
  Problem& p = small.problem;
  p.dtype_q = plan.problem.dtype_q;
  p.dtype_kv = plan.problem.dtype_kv;
  p.quantised_k = plan.problem.quantised_k;
  p.quantised_v = plan.problem.quantised_v;
  p.scales_k = plan.problem.scales_k;
  p.scales_v = plan.problem.scales_v;
  p.heads_q = p.heads_kv = 16;
  p.len_q = p.len_k = p.dim_qk = p.dim_v = 64;
  set_dense(p);
  if (plan.problem.pass == Pass::kBackward) turn_backward(p);
  const Result<RequestData> data = RequestData::make(small, 1);
  if (!data.ok()) return data.status();
  Limits forced;
  forced.kernel = plan.kernel;
  forced.threads = plan.limits.threads;
  Result<Execution> execution = Execution::prepare(p, forced, data->tensors());
  if (!execution.ok()) return execution.status();
  for (int i = 0; i < 20; ++i) {
    if (Status status = execution->run(); !status.ok()) return status;
  }
  return {};
}

class Runner {
 public:
  explicit Runner(const RunFlags& flags) : flags_(flags) {}

  int run() {
    const auto limits = read_limits(flags_.limits);
    if (!limits.ok()) return report(limits.status());
    if (flags_.parallel.empty()) {
      if (Status status = refuse_parallel_flags(flags_.ranks, "--parallel"); !status.ok()) {
        return report(status);
      }
      if (flags_.every_strategy) {
        return report(invalid("--every-strategy has no effect on one device"));
      }
    }
    if (!flags_.file.empty()) {
      if (!flags_.parallel.empty()) {
        return report(invalid("--parallel has no effect with a file"));
      }
      if (flags_.seed) return report(invalid("--seed has no effect with a file"));
      Result<StoredProblem> stored = read_problem_file(flags_.file, flags_.problem);
      if (!stored.ok()) return report(stored.status());
      const int code = run_one(stored->request, *limits, &*stored);
      if (flags_.json && (code == kFine || code == kWrongNumbers)) {
        fmt::print("{}\n", documents_.front().dump(2));
      }
      return code;
    }
    const auto requests = read_requests(flags_.problem);
    if (!requests.ok()) return report(requests.status());
    if (!flags_.parallel.empty()) return run_parallel(*requests, *limits);
    if (!flags_.out.empty() && flags_.problem.backward == "true") {
      return report(invalid("--out has no effect with --backward, which writes no out"));
    }
    if (!flags_.out.empty() && requests->size() > 1) {
      return report(invalid(fmt::format("--out has room for one answer; {} has {} kinds of layers",
                                        flags_.problem.model, requests->size())));
    }
    int worst = kFine;
    for (const Request& request : *requests) {
      worst = std::max(worst, run_one(request, *limits, nullptr));
      if (is_interrupted()) break;
    }
    const bool is_one = flags_.problem.model.empty();
    if (flags_.json && !is_one) {
      fmt::print("{}\n", documents_.dump(2));
    } else if (flags_.json && (worst == kFine || worst == kWrongNumbers)) {
      fmt::print("{}\n", documents_.front().dump(2));
    }
    return worst;
  }

 private:
  int run_parallel(const std::vector<Request>& requests, const Limits& limits) const {
    if (requests.size() > 1) {
      return report(invalid(fmt::format("--parallel runs one problem; {} has {} kinds of layers",
                                        flags_.problem.model, requests.size())));
    }
    if (!flags_.out.empty()) return report(invalid("--out has no effect with --parallel"));
    return cli::run_parallel({requests.front(), limits, flags_.ranks,
                              *kTransports.value(flags_.parallel), flags_.every_strategy,
                              flags_.seed.value_or(1), flags_.json});
  }

  // The other kinds of layers of a model still run.
  int fail(const Request& request, const Status& status) {
    documents_.push_back({{"problem", request.name()}, {"error", status.message()}});
    return report(status);
  }

  int run_one(const Request& request, const Limits& limits, StoredProblem* stored) try {
    const Problem& p = request.problem;
    Result<Plan> plan = plan_as_library(p, limits);
    if (!plan.ok()) return fail(request, plan.status());
    if (Status status = runnable_status(*plan); !status.ok()) return fail(request, status);
    if (!flags_.json) fmt::print("{}{}\n", environment_line(p), explain(*plan));
    if (stored == nullptr) {
      if (Status status = warm_up(*plan); !status.ok()) return fail(request, status);
    }
    const uint64_t resident_before = resident_bytes();
    // Only now: what the limits refuse may have tensors of 100 GB.
    RequestData random;
    if (stored == nullptr) {
      Result<RequestData> made = RequestData::make(request, flags_.seed.value_or(1));
      if (!made.ok()) return fail(request, made.status());
      random = std::move(*made);
    }
    const Tensors tensors = stored == nullptr ? random.tensors() : stored->tensors;
    Result<Execution> execution = Execution::prepare(std::move(*plan), tensors);
    if (!execution.ok()) return fail(request, execution.status());
    execution->watch_workspace();
    const auto first = run_watched(*execution);
    if (!first.ok()) return fail(request, first.status());
    const auto samples = time(*execution, *first);
    if (!samples.ok()) return fail(request, samples.status());
    if (Status status = execution->fetch_outputs(); !status.ok()) return fail(request, status);
    Json document =
        describe_run(request, execution->plan(), *samples, execution->peak_workspace_bytes());
    document["longest_step_us"] = first->longest_step_us;
    const bool is_host = backend(p.device).is_host();
    if (is_host && stored == nullptr) {
      document["tensor_bytes"] = random.bytes();
      document["peak_resident_bytes"] = first->peak_resident_bytes - resident_before;
    }
    if (!flags_.json) print_run(document);
    const int code = stored == nullptr ? compare_sampled(p, random, document)
                                       : compare_stored(*stored, tensors, document);
    if (!flags_.out.empty()) {
      if (Status status = write_out(p, tensors); !status.ok()) return fail(request, status);
    }
    documents_.push_back(std::move(document));
    return code;
  } catch (const std::bad_alloc&) {
    return fail(request, {Code::kOutOfMemory, "not enough memory"});
  }

  Result<Samples> time(Execution& execution, const FirstRun& first) {
    const double estimate_us = execution.plan().estimated_us;
    if (estimate_us < 1e6) {
      const bool is_host = backend(execution.plan().problem.device).is_host();
      Guard guard(is_host ? cpu_facts().threads(flags_.limits.threads) : 0);
      const auto call = [&] {
        return is_interrupted() ? Status(Code::kCancelled, "interrupted between two runs")
                                : execution.run();
      };
      auto samples = measure({{call}}, guard, {9, is_host ? 5.0 : 2.0});
      if (!samples.ok()) return samples.status();
      return (*samples)[0];
    }
    // Long enough to need no second sample.
    Samples samples;
    samples.is_guarded = false;
    samples.us.push_back(first.us);
    return samples;
  }

  static Json describe_run(const Request& request, const Plan& plan, const Samples& samples,
                           uint64_t peak_bytes) {
    return {{"problem", describe(request.problem)},
            {"environment", environment_json(request.problem)},
            {"kernel", plan.kernel},
            {"best_us", samples.best()},
            {"median_us", samples.median()},
            {"samples", samples.us.size()},
            {"guarded", samples.is_guarded},
            {"estimated_us", plan.estimated_us},
            {"gflops", useful_flops(request) / samples.best() * 1e-3},
            {"kv_gbytes_per_s", kv_bytes(request) / samples.best() * 1e-3},
            {"workspace_bytes", plan.workspace_bytes},
            {"peak_workspace_bytes", peak_bytes}};
  }

  static void print_run(const Json& run) {
    fmt::print("time       {} best, {} median of {}\n", format_us(run["best_us"]),
               format_us(run["median_us"]), run["samples"].get<int64_t>());
    fmt::print("rate       {:.0f} GFLOP/s on visible pairs, {:.1f} GB/s of K and V\n",
               run["gflops"].get<double>(), run["kv_gbytes_per_s"].get<double>());
    fmt::print("workspace  {} planned, {} used\n", format_bytes(run["workspace_bytes"]),
               format_bytes(run["peak_workspace_bytes"]));
  }

  int compare_stored(const StoredProblem& stored, const Tensors& tensors, Json& document) {
    const Problem& p = stored.request.problem;
    int code = kFine;
    if (stored.out) {
      const Errors errors = errors_of(all_of_out(p, tensors), floats_of(*stored.out));
      document["relative_rms"] = errors.relative_rms();
      document["compared_rows"] = p.batch * p.heads_q * p.len_q;
      code = judge("out", beside_stored(errors, tolerance_of(p.dtype_q)));
    }
    if (stored.log_sum_exp && p.wants_log_sum_exp) {
      const float* lse = tensors.log_sum_exp;
      const std::vector<float> have(lse, lse + p.batch * p.heads_q * p.len_q);
      const Errors errors = errors_of(have, floats_of(*stored.log_sum_exp));
      document["log_sum_exp_relative_rms"] = errors.relative_rms();
      code = std::max(code, judge("LSE", beside_stored(errors, kLogSumExpTolerance)));
    }
    return code;
  }

  int compare_sampled(const Problem& p, RequestData& data, Json& document) {
    data.expect();
    const Accuracy accuracy = data.accuracy();
    document["relative_rms"] = accuracy.relative_rms;
    document["compared_rows"] = accuracy.compared_rows;
    const bool is_forward = p.pass == Pass::kForward;
    if (!is_forward) document["compared_keys"] = accuracy.compared_keys;
    return judge(is_forward ? "out" : "gradient", accuracy);
  }

  int judge(const char* name, const Accuracy& accuracy) const {
    const bool is_right = accuracy.relative_rms <= accuracy.tolerance;  // NaN is not
    if (!flags_.json) {
      fmt::print(
          "{:<10} {} {}: relative RMS error {:.2e}, at most {:.2g} is right; largest error "
          "{:.2e}\n",
          name, is_right ? "agrees with" : "DIFFERS from", accuracy.reference,
          accuracy.relative_rms, accuracy.tolerance, accuracy.largest);
    }
    return is_right ? kFine : kWrongNumbers;
  }

  Status write_out(const Problem& p, const Tensors& tensors) {
    const std::vector<float> out = all_of_out(p, tensors);
    std::vector<int64_t> rows{p.batch, p.heads_q, p.len_q};
    if (p.query_layout == QueryLayout::kPacked) rows = {p.total_q, p.heads_q};
    std::vector<int64_t> shape = rows;
    shape.push_back(p.dim_v);
    std::vector<TensorToStore> stored{{"out", "F32", shape, std::as_bytes(std::span(out))}};
    if (p.wants_log_sum_exp) {
      stored.push_back({"log_sum_exp",
                        "F32",
                        rows,
                        {reinterpret_cast<const std::byte*>(tensors.log_sum_exp),
                         static_cast<size_t>(tensor_bytes(p).log_sum_exp)}});
    }
    return write_safetensors(flags_.out, stored);
  }

  const RunFlags& flags_;
  Json documents_ = Json::array();
};

}  // namespace

void add_run(CLI::App& app, Action& action) {
  auto flags = std::make_shared<RunFlags>();
  CLI::App* verb = app.add_subcommand("run", "Run a problem from a file, or on random data");
  verb->add_option("file", flags->file,
                   "a .safetensors file with q, k, v: their shapes, its options");
  add_problem_flags(*verb, flags->problem);
  add_limits_flags(*verb, flags->limits);
  add_number_flag(*verb, "--seed", flags->seed, kSeeds,
                  "of the random data (1); some rows of its answer are compared with float64");
  verb->add_option("--out", flags->out, "write out (f32) to this .safetensors file");
  add_transport_flag(*verb, flags->parallel);
  add_ranks_flag(*verb, flags->ranks,
                 "so many ranks, each with a part of the tokens (mpirun's, or every CUDA device)");
  add_parallel_flags(*verb, flags->ranks);
  verb->add_flag("--every-strategy", flags->every_strategy,
                 "run each strategy that the limits allow, one after another")
      ->group("PARALLEL");
  verb->add_flag("--json", flags->json, "print one JSON document");
  verb->callback([flags, &action] { action = [flags] { return Runner(*flags).run(); }; });
}

}  // namespace wh::cli
