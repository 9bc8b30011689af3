// cpu_reference as an entry of the registry.
#include <algorithm>
#include <atomic>

#include "core/carver.h"
#include "core/sequence.h"
#include "cpu/cpu_facts.h"
#include "cpu/reference/reference.h"
#include "cpu/registry.h"
#include "plan/work.h"

namespace wh::cpu {
namespace {

// That a row is left for.
int32_t workers_of(const Problem& p, const Config& config) {
  return static_cast<int32_t>(std::min<int64_t>(config.workers, all_query_rows(p)));
}

WorkerScratches scratches_of(const Problem& p) {
  Carver one(nullptr);
  one.take<std::byte>(static_cast<int64_t>(reference_workspace_bytes(p)));
  return {Carver(nullptr), one};
}

Config configure(const Query& query) {
  Config config;
  config.arithmetic = Arithmetic::kF64;
  config.workers = cpu_facts(query).threads(query.limits.threads);
  return config;
}

Status run(const Launch& launch) {
  const Problem& p = launch.problem;
  const int64_t rows = query_rows(p, launch.tensors);
  const WorkerScratches scratches = scratches_of(p);
  Progress& progress = launch.progress;
  progress.start(rows);
  std::atomic<int64_t> next{0};
  parallel(launch.executor, workers_of(p, launch.config), [&](int32_t i) {
    std::byte* scratch = scratches.at(launch.tensors.workspace, i);
    for (int64_t row = next++; row < rows && !progress.is_cancelled(); row = next++) {
      progress.writing_out();
      reference_rows(p, launch.tensors, row, row + 1, reinterpret_cast<double*>(scratch));
      progress.step_done();
    }
  });
  return progress.finish();
}

size_t workspace_bytes(const Problem& p, const Config& config) {
  return scratches_of(p).bytes(workers_of(p, config));
}

constexpr double kMultiplyAddUs = 1.5e-3;  // on one core: strided loads, conversions one at a time

// With what a call takes in which there is nothing to do: without it an empty problem would go to
// the slowest kernel.
double estimate_us(const Query& query, const Config& config) {
  constexpr double kCallUs = 3;
  const Problem& p = query.problem;
  const double out = static_cast<double>(all_query_rows(p) * p.dim_v);
  return (useful_flops(p) / 2 + out) * kMultiplyAddUs /
             std::min(config.workers, cpu_facts(query).cores) +
         kCallUs;
}

double step_us(const Query& query, const Config&) {
  const Problem& p = query.problem;
  return static_cast<double>(p.len_k * (p.dim_qk + p.dim_v)) * kMultiplyAddUs;
}

}  // namespace

const Kernel kReference{
    .name = "cpu_reference",
    .role = Role::kReference,
    .summary = "float64, row by row: the oracle",
    .takes_all_layouts = true,
    .refusal = [](const Query&) -> std::optional<std::string> { return std::nullopt; },
    .configure = configure,
    .variant = [](const Query&, const Config&) -> std::string { return "float64"; },
    .workspace_bytes = workspace_bytes,
    .estimate_us = estimate_us,
    .run = run,
    .step_us = step_us,
    .reads_quantised = true};

}  // namespace wh::cpu
