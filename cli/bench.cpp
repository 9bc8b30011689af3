// widehead bench: kernels side by side on a suite or one problem.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <memory>

#include "api/machine.h"
#include "chart.h"
#include "core/nearest_name.h"
#include "execution.h"
#include "limits_flags.h"
#include "measure.h"
#include "plan/work.h"
#include "probe.h"
#include "problem_flags.h"
#include "session.h"

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

// One kernel on one problem.
struct BenchRow {
  std::string kernel;
  std::string refusal;  // empty: it ran
  Samples samples;
  double estimated_us = 0;
  uint64_t workspace_bytes = 0;
};

struct BenchResult {
  Request request;
  std::string chosen;  // by the planner; empty: none
  std::vector<BenchRow> rows;

  const BenchRow* fastest() const {
    const BenchRow* best = nullptr;
    for (const BenchRow& row : rows) {
      if (!row.refusal.empty()) continue;
      if (best == nullptr || row.samples.best() < best->samples.best()) best = &row;
    }
    return best;
  }
  const BenchRow* row_of(const std::string& kernel) const {
    for (const BenchRow& row : rows) {
      if (row.kernel == kernel && row.refusal.empty()) return &row;
    }
    return nullptr;
  }
  // Time of the chosen kernel over that of the fastest; 0 when nothing ran.
  double regret() const {
    const BenchRow* chosen_row = row_of(chosen);
    return chosen_row == nullptr ? 0 : chosen_row->samples.best() / fastest()->samples.best();
  }
};

// What mlx #3293 settled on at first: fused from 16384 keys on.
const char* threshold_choice(const Problem& p) { return p.len_k >= 16384 ? "fused" : "unfused"; }

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

class Bench {
 public:
  explicit Bench(const BenchFlags& flags)
      : flags_(flags),
        guard_(cpu_facts().threads(flags.limits.threads)),
        read_gbytes_per_s_(read_gbytes_per_s(cpu_facts().threads(flags.limits.threads))) {}

  int run() {
    const auto limits = read_limits(flags_.limits);
    if (!limits.ok()) return report(limits.status());
    const auto requests = flags_.suite.empty() ? read_requests(flags_.problem)
                                               : read_suite(flags_.suite, flags_.problem);
    if (!requests.ok()) return report(requests.status());
    is_routing_ = flags_.suite == "routing";
    if (!requests->empty()) {
      const Problem& p = requests->front().problem;
      if (p.device == Device::kCuda) device_name_ = cuda_facts(p.device_index).name;
    }
    if (!flags_.json) print_header();
    ProgressLine line(!flags_.json);
    for (size_t i = 0; i < requests->size(); ++i) {
      line.show(fmt::format("{} of {}: {}", i + 1, requests->size(), (*requests)[i].name()));
      auto result = bench_one((*requests)[i], *limits);
      if (!result.ok()) return report(result.status());
      line.show("");
      if (!flags_.json) print(*result);
      results_.push_back(std::move(*result));
    }
    if (flags_.json) fmt::print("{}\n", document().dump(2));
    if (is_routing_ && !flags_.json) print_regret();
    return write_files();
  }

 private:
  Result<std::vector<std::string>> rivals(const Problem& p) const {
    std::vector<std::string> all, names;
    for (const Kernel* kernel : kernels_of(p.device)) all.push_back(kernel->name);
    if (is_routing_) return all;
    for (size_t begin = 0; begin < flags_.against.size();) {
      const size_t end = std::min(flags_.against.find(',', begin), flags_.against.size());
      names.push_back(flags_.against.substr(begin, end - begin));
      if (std::find(all.begin(), all.end(), names.back()) == all.end()) {
        return invalid(fmt::format("--against names \"{}\"; did you mean \"{}\"?", names.back(),
                                   nearest_name(names.back(), all)));
      }
      begin = end + 1;
    }
    return names;
  }

  Result<BenchResult> bench_one(const Request& request, const Limits& limits) {
    const Problem& p = request.problem;
    const auto names = rivals(p);
    if (!names.ok()) return names.status();
    const Result<Plan> plan = make_plan(p, limits, this_machine(p.device, p.device_index));
    if (!plan.ok()) return plan.status();
    BenchResult result{request, plan->kernel, {}};
    std::vector<std::string> kernels;
    if (plan->runnable()) kernels.push_back(plan->kernel);
    for (const std::string& name : *names) {
      if (std::find(kernels.begin(), kernels.end(), name) == kernels.end()) kernels.push_back(name);
    }
    HostTensors tensors = random_tensors(request, 1);
    std::vector<Execution> executions;
    std::vector<size_t> row_of_execution;
    for (const std::string& kernel : kernels) {
      BenchRow row;
      row.kernel = kernel;
      for (const Candidate& candidate : plan->candidates) {
        if (candidate.kernel != kernel) continue;
        row.workspace_bytes = candidate.workspace_bytes;
        row.estimated_us = candidate.estimated_us;
        if (candidate.verdict == Verdict::kRefused || candidate.verdict == Verdict::kOverBudget) {
          row.refusal = candidate.reason;
        }
      }
      if (row.refusal.empty() && row.estimated_us > flags_.skip_over * 1e6) {
        row.refusal = fmt::format("skipped: about {}", format_us(row.estimated_us));
      }
      // The float64 oracle is no rival where it takes seconds.
      if (is_routing_ && row.estimated_us > 2e6 && kernel != plan->kernel) {
        row.refusal = fmt::format("skipped: about {}", format_us(row.estimated_us));
      }
      if (row.refusal.empty()) {
        Limits forced = limits;
        forced.kernel = kernel;
        Result<Execution> execution = Execution::prepare(p, forced, tensors);
        if (!execution.ok()) {
          row.refusal = execution.status().message();
        } else {
          executions.push_back(std::move(*execution));
          row_of_execution.push_back(result.rows.size());
        }
      }
      result.rows.push_back(std::move(row));
    }
    std::vector<Run> runs;
    for (Execution& execution : executions) {
      runs.push_back([&execution] { return execution.run(); });
    }
    auto samples = measure(runs, guard_, {flags_.samples, flags_.seconds});
    if (!samples.ok()) return samples.status();
    for (size_t i = 0; i < executions.size(); ++i) {
      result.rows[row_of_execution[i]].samples = std::move((*samples)[i]);
    }
    return result;
  }

  void print_header() const {
    fmt::print("{}; the CPU's multiply-adds {:.0f} GFLOP/s, reads {:.1f} GB/s\n\n", device_name_,
               guard_.peak_gflops(), read_gbytes_per_s_);
    fmt::print("{:<58} {:<18} {:>10} {:>10} {:>8} {:>6} {:>6} {:>10} {:>7}\n", "problem", "kernel",
               "best", "median", "GFLOP/s", "share", "GB/s", "workspace", "speed");
  }

  double peak_share(const Problem& p, const BenchRow& row) const {
    return useful_flops(p) / row.samples.best() * 1e-3 / guard_.peak_gflops();
  }

  void print(const BenchResult& result) const {
    const Problem& p = result.request.problem;
    std::string name = result.request.name();
    for (const BenchRow& row : result.rows) {
      const std::string kernel = row.kernel + (row.kernel == result.chosen ? " *" : "");
      if (!row.refusal.empty()) {
        fmt::print("{:<58} {:<18} {} ({})\n", name, kernel, row.refusal,
                   format_bytes(row.workspace_bytes));
      } else {
        // Speed beside the planner's choice: above 1 it should have chosen this one.
        const BenchRow* chosen = result.row_of(result.chosen);
        const double speed = chosen == nullptr ? 1 : chosen->samples.best() / row.samples.best();
        fmt::print("{:<58} {:<18} {:>10} {:>10} {:>8.0f} {:>5.0f}% {:>6.1f} {:>10} {:>6.2f}x{}\n",
                   name, kernel, format_us(row.samples.best()), format_us(row.samples.median()),
                   useful_flops(p) / row.samples.best() * 1e-3, 100 * peak_share(p, row),
                   kv_bytes(p) / row.samples.best() * 1e-3, format_bytes(row.workspace_bytes),
                   speed, row.samples.is_guarded ? "" : "  disturbed");
      }
      name.clear();
    }
    std::fflush(stdout);
  }

  void print_regret() const {
    std::vector<double> regrets, errors;
    for (const BenchResult& result : results_) {
      if (result.regret() == 0) continue;
      regrets.push_back(result.regret());
      const BenchRow* chosen = result.row_of(result.chosen);
      errors.push_back(std::fabs(chosen->estimated_us / chosen->samples.best() - 1));
    }
    if (regrets.empty()) return;
    fmt::print(
        "\n* chosen by the planner. Regret over {} problems: median {:.3f}, worst {:.3f}. "
        "Estimates are off by {:.0f} % (median), {:.0f} % (worst)\n",
        regrets.size(), median(regrets), *std::max_element(regrets.begin(), regrets.end()),
        100 * median(errors), 100 * *std::max_element(errors.begin(), errors.end()));
  }

  Json row_json(const BenchResult& result, const BenchRow& row) const {
    const Problem& p = result.request.problem;
    Json json{{"problem", describe(p)},
              {"queries", p.len_q},
              {"keys", p.len_k},
              {"kernel", row.kernel},
              {"chosen", row.kernel == result.chosen},
              {"threshold_would_choose", threshold_choice(p)},
              {"estimated_us", row.estimated_us},
              {"workspace_bytes", row.workspace_bytes}};
    if (!row.refusal.empty()) {
      json["refused"] = row.refusal;
      return json;
    }
    json["best_us"] = row.samples.best();
    json["median_us"] = row.samples.median();
    json["samples"] = row.samples.us.size();
    json["dropped"] = row.samples.dropped;
    json["guarded"] = row.samples.is_guarded;
    json["gflops"] = useful_flops(p) / row.samples.best() * 1e-3;
    json["peak_share"] = peak_share(p, row);
    json["kv_gbytes_per_s"] = kv_bytes(p) / row.samples.best() * 1e-3;
    json["read_share"] = kv_bytes(p) / row.samples.best() * 1e-3 / read_gbytes_per_s_;
    return json;
  }

  Json rows_json() const {
    Json rows = Json::array();
    for (const BenchResult& result : results_) {
      for (const BenchRow& row : result.rows) rows.push_back(row_json(result, row));
    }
    return rows;
  }

  Json document() const {
    Json json{{"suite", flags_.suite},
              {"device", device_name_},
              {"isa", cpu_facts().isa},
              {"threads", cpu_facts().threads(flags_.limits.threads)},
              {"multiply_add_gflops", guard_.peak_gflops()},
              {"read_gbytes_per_s", read_gbytes_per_s_},
              {"rows", rows_json()}};
    if (!is_routing_) return json;
    Json routing = Json::array();
    for (const BenchResult& result : results_) {
      const BenchRow* chosen = result.row_of(result.chosen);
      if (chosen == nullptr) continue;
      routing.push_back({{"problem", describe(result.request.problem)},
                         {"chosen", result.chosen},
                         {"fastest", result.fastest()->kernel},
                         {"regret", result.regret()},
                         {"estimated_us", chosen->estimated_us},
                         {"measured_us", chosen->samples.best()}});
    }
    json["routing"] = routing;
    return json;
  }

  std::string csv() const {
    constexpr const char* kColumns[] = {
        "problem",         "queries",         "keys",         "kernel", "chosen",
        "best_us",         "median_us",       "samples",      "gflops", "peak_share",
        "kv_gbytes_per_s", "workspace_bytes", "estimated_us", "refused"};
    std::string text = fmt::format("{}\n", fmt::join(kColumns, ","));
    for (const Json& row : rows_json()) {
      std::vector<std::string> cells;
      for (const char* column : kColumns) {
        cells.push_back(row.contains(column) ? row[column].dump() : "");
      }
      text += fmt::format("{}\n", fmt::join(cells, ","));
    }
    return text;
  }

  Chart chart() const {
    std::string y = "best_us";
    const auto suite = suites().find(flags_.suite);
    if (suite != suites().end() && suite->contains("chart")) y = (*suite)["chart"]["y"];
    Chart chart{flags_.suite.empty() ? "widehead bench"
                                     : "widehead bench " + flags_.suite + ", " + device_name_,
                "keys",
                y == "gflops" ? "GFLOP/s on visible pairs"
                              : (y == "kv_gbytes_per_s" ? "GB/s of K and V" : "microseconds"),
                {}};
    // A line for each kernel and each kind of problem: heads and dims.
    for (const BenchResult& result : results_) {
      const Problem& p = result.request.problem;
      for (const BenchRow& row : result.rows) {
        if (!row.refusal.empty()) continue;
        const std::string name =
            fmt::format("{} {}/{} d{}", row.kernel, p.heads_q, p.heads_kv, p.dim_qk);
        auto series = std::find_if(chart.series.begin(), chart.series.end(),
                                   [&](const Series& one) { return one.name == name; });
        if (series == chart.series.end()) {
          chart.series.push_back({name, {}});
          series = chart.series.end() - 1;
        }
        series->points.emplace_back(static_cast<double>(p.len_k), row_json(result, row)[y]);
      }
    }
    return chart;
  }

  int write_files() const {
    const std::pair<std::string, std::string> files[] = {
        {flags_.csv, flags_.csv.empty() ? "" : csv()},
        {flags_.svg, flags_.svg.empty() ? "" : to_svg(chart())}};
    for (const auto& [path, text] : files) {
      if (path.empty()) continue;
      std::ofstream file(path);
      file << text;
      file.close();
      if (!file) return report(invalid("cannot write " + path));
    }
    return kFine;
  }

  const BenchFlags& flags_;
  Guard guard_;
  double read_gbytes_per_s_;
  std::string device_name_ = cpu_facts().name;
  bool is_routing_ = false;
  std::vector<BenchResult> results_;
};

}  // namespace

void add_bench(CLI::App& app, Action& action) {
  auto flags = std::make_shared<BenchFlags>();
  CLI::App* verb = app.add_subcommand("bench", "Time kernels side by side on a suite or a problem");
  verb->add_option("suite", flags->suite, "see `list suites`; else give a PROBLEM");
  add_problem_flags(*verb, flags->problem);
  add_limits_flags(*verb, flags->limits);
  verb->add_option("--against", flags->against, "kernels to run beside the planner's choice: A,B");
  verb->add_option("--samples", flags->samples, "of each kernel on each problem (9)");
  verb->add_option("--seconds", flags->seconds, "stop sampling a problem after this long (20)");
  verb->add_option("--skip-over", flags->skip_over, "skip runs estimated longer, seconds (120)");
  verb->add_option("--csv", flags->csv, "write the rows as CSV");
  verb->add_option("--svg", flags->svg, "draw a chart");
  verb->add_flag("--json", flags->json, "print one JSON document");
  verb->callback([flags, &action] { action = [flags] { return Bench(*flags).run(); }; });
}

}  // namespace wh::cli
