// What `widehead bench` measured, and its faces: a table, JSON, CSV, a chart.
#pragma once

#include <string>
#include <vector>

#include "input/problem_flags.h"
#include "measure/measure.h"
#include "plan/kernel.h"
#include "report/chart.h"

namespace wh::cli {

// The device that was measured, and what it can do at best.
struct BenchDevice {
  std::string name;
  std::string isa;      // instruction set, or compute capability
  int32_t threads = 0;  // or multiprocessors
  double peak_gflops = 0;
  double one_thread_gflops = 0;  // CPU only
  double bf16_gflops = 0;        // of VDPBF16PS; 0 without
  double read_gbytes_per_s = 0;
  int64_t last_level_cache_bytes = 0;
  std::string blas;     // CPU: what cpu_unfused multiplies with
  std::string warning;  // why times and shares are not what the machine should reach

  // What the share of a kernel is of.
  double peak_of(const std::string& kernel) const {
    return kernel == "cpu_prefill_bf16" && bf16_gflops > 0 ? bf16_gflops : peak_gflops;
  }
};

// One kernel on one problem.
struct BenchRow {
  std::string kernel;
  Role role = Role::kFused;
  std::string refusal;  // empty: it ran
  Samples samples;
  double estimated_us = 0;
  uint64_t workspace_bytes = 0, peak_workspace_bytes = 0;  // planned and touched
  double relative_rms = 0;                                 // against float64, on sampled rows
  double imbalance = 0;  // of the workers' times: largest over mean, less 1; CPU only

  bool ran() const { return refusal.empty(); }
};

struct BenchResult {
  Request request;
  std::string chosen;     // by the planner; empty: none
  std::string estimates;  // where its times come from
  std::vector<BenchRow> rows;
  // In suites that compare with their first row: the chosen kernel on that row, sampled in turn
  // with this one's, by useful multiply-adds. 0: no such comparison.
  double plain_us_per_gflop = 0;

  const BenchRow* row_of(const std::string& kernel) const;  // null: it did not run
  const BenchRow* fastest() const;
  const BenchRow* unfused() const;
  // Time of the chosen kernel over that of the fastest; 0 when nothing ran.
  double regret() const;
  // Both of them have undisturbed samples.
  bool is_regret_guarded() const;
  // What the chosen kernel takes for a useful multiply-add, over what the first row takes.
  double times_plain() const;
};

// "fused" or "unfused": what a fixed threshold of 16384 keys takes, as mlx #3293 first had it.
const char* threshold_choice(const Problem& problem);

std::string bench_table_header(const BenchDevice& device);
std::string bench_table(const BenchDevice& device, const BenchResult& result);
// Regret and the errors of estimates, in a sentence; empty when nothing ran.
std::string regret_text(const std::vector<BenchResult>& results);

Json bench_json(const std::string& suite, const BenchDevice& device,
                const std::vector<BenchResult>& results);
std::string bench_csv(const Json& document);
Chart bench_chart(const std::string& suite, const BenchDevice& device,
                  const std::vector<BenchResult>& results);

}  // namespace wh::cli
