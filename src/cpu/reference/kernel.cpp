// cpu_reference as an entry of the registry.
#include <atomic>

#include "cpu/common/scratch.h"
#include "cpu/reference/reference.h"
#include "cpu/registry.h"
#include "plan/work.h"

namespace wh::cpu {
namespace {

size_t worker_bytes(const Problem& p) {
  Carver carver(nullptr);
  carver.take<std::byte>(static_cast<int64_t>(reference_workspace_bytes(p)));
  return carver.used_bytes();
}

Config configure(const Query& query) {
  Config config;
  config.variant = "float64";
  config.threads = query.cpu.threads(query.limits.threads);
  return config;
}

Status run(const Launch& launch) {
  const Problem& p = launch.problem;
  const int64_t rows = p.batch * p.heads_q * p.len_q;
  Progress& progress = launch.progress;
  progress.start(rows);
  std::atomic<int64_t> next{0};
  parallel(launch.executor, launch.config.threads, [&](int32_t i) {
    auto* scratch = static_cast<std::byte*>(launch.tensors.workspace) + worker_bytes(p) * i;
    for (int64_t row = next++; row < rows && !progress.is_cancelled(); row = next++) {
      progress.writing_out();
      reference_rows(p, launch.tensors, row, row + 1, reinterpret_cast<double*>(scratch));
      progress.step_done();
    }
  });
  return progress.finish();
}

}  // namespace

const Kernel kReference{
    "cpu_reference", Device::kCpu, false, "float64, row by row: the oracle",
    [](const Query&) -> std::optional<std::string> { return std::nullopt; }, configure,
    [](const Problem& p, const Config& config) {
      return worker_bytes(p) * static_cast<size_t>(config.threads);
    },
    // About 1.5 ns a multiply-add and an output on one core: strided loads and conversions, one at
    // a time. And what a call takes in which there is nothing to do: without it an empty problem
    // would go to the slowest kernel.
    [](const Query& query, const Config& config) {
      constexpr double kCallUs = 3;
      const Problem& p = query.problem;
      const double out = static_cast<double>(p.batch * p.heads_q * p.len_q * p.dim_v);
      return (useful_flops(p) / 2 + out) * 1.5e-3 / std::min(config.threads, query.cpu.cores) +
             kCallUs;
    },
    run,
    [](const Query& query, const Config&) {
      const Problem& p = query.problem;
      return static_cast<double>(p.len_k * (p.dim_qk + p.dim_v)) * 1.5e-3;
    }};

}  // namespace wh::cpu
