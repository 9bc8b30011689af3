#include "report/bench_result.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "measure/useful_work.h"
#include "plan/backend.h"
#include "plan/names.h"
#include "plan/units.h"

namespace wh::cli {
namespace {

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

double gflops(const Request& request, const BenchRow& row) {
  return useful_flops(request) / row.samples.best() * 1e-3;
}
double kv_gbytes_per_s(const Request& request, const BenchRow& row) {
  return kv_bytes(request) / row.samples.best() * 1e-3;
}
// Every sample reads the same keys and values: what fits the cache does not come from memory.
bool is_cached(const Request& request, const BenchDevice& device) {
  return kv_bytes(request) < static_cast<double>(device.last_level_cache_bytes);
}

std::string read_share(const BenchDevice& device, const Request& request, const BenchRow& row) {
  if (is_cached(request, device)) return "in cache";
  return fmt::format("{:.0f}%", 100 * kv_gbytes_per_s(request, row) / device.read_gbytes_per_s);
}

Json row_json(const BenchDevice& device, const BenchResult& result, const BenchRow& row) {
  const Problem& p = result.request.problem;
  Json json{{"problem", result.request.name()},
            {"queries", p.len_q},
            {"keys", p.len_k},
            {"kernel", row.kernel},
            {"role", kRoles.name(row.role)},
            {"chosen", row.kernel == result.chosen},
            {"estimates", result.estimates},
            {"estimated_us", row.estimated_us},
            {"workspace_bytes", row.workspace_bytes}};
  if (p.pass == Pass::kForward) json["threshold_would_choose"] = threshold_choice(p);
  if (!row.ran()) {
    json["refused"] = row.refusal;
    return json;
  }
  json["best_us"] = row.samples.best();
  json["median_us"] = row.samples.median();
  json["samples"] = row.samples.us.size();
  json["dropped"] = row.samples.dropped;
  json["guarded"] = row.samples.is_guarded;
  json["gflops"] = gflops(result.request, row);
  json["peak_share"] = gflops(result.request, row) / device.peak_of(row.kernel);
  json["kv_gbytes_per_s"] = kv_gbytes_per_s(result.request, row);
  json["kv_cached"] = is_cached(result.request, device);
  if (!is_cached(result.request, device)) {
    json["read_share"] = kv_gbytes_per_s(result.request, row) / device.read_gbytes_per_s;
  }
  json["peak_workspace_bytes"] = row.peak_workspace_bytes;
  json["relative_rms"] = row.relative_rms;
  if (const BenchRow* unfused = result.unfused(); unfused != nullptr && unfused != &row) {
    json["speed_up"] = unfused->samples.best() / row.samples.best();
  }
  const bool is_host = backend(p.device).is_host();
  if (is_host && row.kernel == result.chosen) json["imbalance"] = row.imbalance;
  if (row.kernel == result.chosen && result.times_plain() > 0) {
    json["times_plain"] = result.times_plain();
  }
  return json;
}

// A line of a chart: problems that differ in length alone. The longest with as many queries as keys
// is the first chunk of a prompt where chunks over more keys follow.
std::string series_name(const Problem& p, const std::vector<BenchResult>& results) {
  const std::string dim =
      p.dim_qk == p.dim_v ? fmt::format("d{}", p.dim_qk) : fmt::format("d{}/{}", p.dim_qk, p.dim_v);
  const auto has_longer = [&](bool is_square) {
    return std::any_of(results.begin(), results.end(), [&](const BenchResult& one) {
      const Problem& other = one.request.problem;
      return other.len_k > p.len_k &&
             (is_square ? other.len_q == other.len_k : other.len_q == p.len_q);
    });
  };
  const bool is_chunk = p.len_q != p.len_k || (has_longer(false) && !has_longer(true));
  const std::string phase = p.len_q == 1 ? "decode"
                            : is_chunk   ? fmt::format("chunk of {}", p.len_q)
                                         : "square";
  return fmt::format("{}/{} {} {}", p.heads_q, p.heads_kv, dim, phase);
}

void add_point(Chart& chart, const std::string& name, double x, double y) {
  auto series = std::find_if(chart.series.begin(), chart.series.end(),
                             [&](const Series& one) { return one.name == name; });
  if (series == chart.series.end()) {
    chart.series.push_back({name, {}});
    series = chart.series.end() - 1;
  }
  series->points.emplace_back(x, y);
}

// How often unfused takes the time of the fastest fused kernel: the crossover is at 1.
void add_crossover(Chart& chart, const BenchResult& result,
                   const std::vector<BenchResult>& results) {
  const BenchRow* unfused = result.unfused();
  double fused_us = 0;
  for (const BenchRow& row : result.rows) {
    if (!row.ran() || row.role != Role::kFused) continue;
    if (fused_us == 0 || row.samples.best() < fused_us) fused_us = row.samples.best();
  }
  if (unfused == nullptr || fused_us == 0) return;
  const Problem& p = result.request.problem;
  add_point(chart, series_name(p, results), static_cast<double>(p.len_k),
            unfused->samples.best() / fused_us);
}

}  // namespace

const BenchRow* BenchResult::row_of(const std::string& kernel) const {
  for (const BenchRow& row : rows) {
    if (row.kernel == kernel && row.ran()) return &row;
  }
  return nullptr;
}

const BenchRow* BenchResult::fastest() const {
  const BenchRow* best = nullptr;
  for (const BenchRow& row : rows) {
    if (!row.ran()) continue;
    if (best == nullptr || row.samples.best() < best->samples.best()) best = &row;
  }
  return best;
}

const BenchRow* BenchResult::unfused() const {
  for (const BenchRow& row : rows) {
    if (row.ran() && row.role == Role::kBaseline) return &row;
  }
  return nullptr;
}

double BenchResult::regret() const {
  const BenchRow* chosen_row = row_of(chosen);
  return chosen_row == nullptr ? 0 : chosen_row->samples.best() / fastest()->samples.best();
}

bool BenchResult::is_regret_guarded() const {
  const BenchRow* chosen_row = row_of(chosen);
  return chosen_row != nullptr && chosen_row->samples.is_guarded && fastest()->samples.is_guarded;
}

double BenchResult::times_plain() const {
  const BenchRow* chosen_row = row_of(chosen);
  if (chosen_row == nullptr || plain_us_per_gflop == 0) return 0;
  return chosen_row->samples.best() / (useful_flops(request) * 1e-9) / plain_us_per_gflop;
}

const char* threshold_choice(const Problem& p) { return p.len_k >= 16384 ? "fused" : "unfused"; }

std::string bench_table_header(const BenchDevice& device) {
  const std::string warning =
      device.warning.empty() ? "" : fmt::format("warning: {}\n", device.warning);
  return fmt::format("{} ({}, {}): multiply-adds {:.0f} GFLOP/s, reads {:.1f} GB/s\n{}\n",
                     device.name, device.isa, device.threads, device.peak_gflops,
                     device.read_gbytes_per_s, warning) +
         fmt::format("{:<62} {:<19} {:>10} {:>10} {:>8} {:>6} {:>6} {:>8} {:>10} {:>7}  {}\n",
                     "problem", "kernel (* chosen)", "best", "median", "GFLOP/s", "share", "GB/s",
                     "reads", "workspace", "speed", "16384 keys take");
}

std::string bench_table(const BenchDevice& device, const BenchResult& result) {
  const Problem& p = result.request.problem;
  std::string text, name = result.request.name();
  for (const BenchRow& row : result.rows) {
    const std::string kernel = row.kernel + (row.kernel == result.chosen ? " *" : "");
    if (!row.ran()) {
      text += fmt::format("{:<62} {:<19} {} ({})\n", name, kernel, row.refusal,
                          format_bytes(row.workspace_bytes));
      name.clear();
      continue;
    }
    // Beside the planner's choice: above 1 it should have chosen this one.
    const BenchRow* chosen = result.row_of(result.chosen);
    const double speed = chosen == nullptr ? 1 : chosen->samples.best() / row.samples.best();
    text += fmt::format(
        "{:<62} {:<19} {:>10} {:>10} {:>8.0f} {:>5.0f}% {:>6.1f} {:>8} {:>10} {:>6.2f}x", name,
        kernel, format_us(row.samples.best()), format_us(row.samples.median()),
        gflops(result.request, row), 100 * gflops(result.request, row) / device.peak_of(row.kernel),
        kv_gbytes_per_s(result.request, row), read_share(device, result.request, row),
        format_bytes(row.workspace_bytes), speed);
    text +=
        fmt::format("  {}", name.empty() || p.pass == Pass::kBackward ? "" : threshold_choice(p));
    if (row.kernel == result.chosen && result.times_plain() > 0) {
      text += fmt::format("  {:.2f} x plain", result.times_plain());
    }
    text += row.samples.is_guarded ? "\n" : "  disturbed\n";
    name.clear();
  }
  return text;
}

std::string regret_text(const std::vector<BenchResult>& results) {
  std::vector<double> regrets, errors;
  int64_t disturbed = 0;
  for (const BenchResult& result : results) {
    if (result.regret() == 0) continue;
    if (!result.is_regret_guarded()) {
      ++disturbed;
      continue;
    }
    regrets.push_back(result.regret());
    const BenchRow* chosen = result.row_of(result.chosen);
    errors.push_back(std::fabs(chosen->estimated_us / chosen->samples.best() - 1));
  }
  const std::string rest =
      disturbed == 0 ? "" : fmt::format(". {} more problems were disturbed", disturbed);
  if (regrets.empty()) return "";
  return fmt::format(
      "\n* chosen by the planner. Regret over {} problems: median {:.3f}, worst {:.3f}. "
      "Estimates ({}) are off by {:.0f} % (median), {:.0f} % (worst){}\n",
      regrets.size(), median(regrets), *std::max_element(regrets.begin(), regrets.end()),
      results.front().estimates, 100 * median(errors),
      100 * *std::max_element(errors.begin(), errors.end()), rest);
}

Json bench_json(const std::string& suite, const BenchDevice& device,
                const std::vector<BenchResult>& results) {
  Json rows = Json::array(), routing = Json::array();
  for (const BenchResult& result : results) {
    for (const BenchRow& row : result.rows) rows.push_back(row_json(device, result, row));
    const BenchRow* chosen = result.row_of(result.chosen);
    if (chosen == nullptr) continue;
    routing.push_back({{"problem", result.request.name()},
                       {"chosen", result.chosen},
                       {"fastest", result.fastest()->kernel},
                       {"regret", result.regret()},
                       {"estimated_us", chosen->estimated_us},
                       {"measured_us", chosen->samples.best()},
                       {"guarded", result.is_regret_guarded()}});
  }
  Json json{{"suite", suite},
            {"device", device.name},
            {"isa", device.isa},
            {"threads", device.threads},
            {"multiply_add_gflops", device.peak_gflops},
            {"one_thread_gflops", device.one_thread_gflops},
            {"read_gbytes_per_s", device.read_gbytes_per_s},
            {"last_level_cache_bytes", device.last_level_cache_bytes},
            {"rows", rows}};
  if (device.bf16_gflops > 0) json["bf16_gflops"] = device.bf16_gflops;
  if (!device.blas.empty()) json["blas"] = device.blas;
  if (!device.warning.empty()) json["warning"] = device.warning;
  if (suite == "routing") json["routing"] = routing;
  return json;
}

std::string bench_csv(const Json& document) {
  constexpr const char* kColumns[] = {"problem",
                                      "queries",
                                      "keys",
                                      "kernel",
                                      "chosen",
                                      "best_us",
                                      "median_us",
                                      "samples",
                                      "dropped",
                                      "guarded",
                                      "gflops",
                                      "peak_share",
                                      "read_share",
                                      "kv_gbytes_per_s",
                                      "kv_cached",
                                      "speed_up",
                                      "times_plain",
                                      "imbalance",
                                      "workspace_bytes",
                                      "peak_workspace_bytes",
                                      "estimates",
                                      "estimated_us",
                                      "threshold_would_choose",
                                      "refused"};
  // RFC 4180: quotes are doubled.
  const auto cell = [](const Json& value) {
    if (!value.is_string()) return value.dump();
    std::string text = "\"";
    for (const char c : value.get<std::string>()) text += c == '"' ? "\"\"" : std::string(1, c);
    return text + "\"";
  };
  std::string text = fmt::format("{}\n", fmt::join(kColumns, ","));
  for (const Json& row : document["rows"]) {
    std::vector<std::string> cells;
    for (const char* column : kColumns) {
      cells.push_back(row.contains(column) ? cell(row[column]) : "");
    }
    text += fmt::format("{}\n", fmt::join(cells, ","));
  }
  return text;
}

Chart bench_chart(const std::string& suite, const BenchDevice& device,
                  const std::vector<BenchResult>& results) {
  std::string y = "best_us";
  const auto found = suites().find(suite);
  if (found != suites().end() && found->contains("chart")) y = (*found)["chart"]["y"];
  Chart chart;
  chart.title = suite.empty() ? "widehead bench" : "widehead bench " + suite + ", " + device.name;
  chart.x_label = "keys";
  chart.x_unit = Unit::kKeys;
  if (y == "crossover") {
    chart.y_label = "time of unfused / fused";
    chart.level = 1;
  } else if (y == "gflops") {
    chart.y_label = "GFLOP/s on visible pairs";
  } else {
    const bool is_rate = y == "kv_gbytes_per_s";
    chart.y_label = is_rate ? "GB/s of K and V" : "time";
    chart.y_unit = is_rate ? Unit::kNumber : Unit::kMicroseconds;
  }
  for (const BenchResult& result : results) {
    if (y == "crossover") {
      add_crossover(chart, result, results);
      continue;
    }
    const Problem& p = result.request.problem;
    for (const BenchRow& row : result.rows) {
      if (!row.ran()) continue;
      const double value = y == "gflops"            ? gflops(result.request, row)
                           : y == "kv_gbytes_per_s" ? kv_gbytes_per_s(result.request, row)
                                                    : row.samples.best();
      add_point(chart, row.kernel + " " + series_name(p, results), static_cast<double>(p.len_k),
                value);
    }
  }
  for (Series& series : chart.series) std::sort(series.points.begin(), series.points.end());
  return chart;
}

}  // namespace wh::cli
