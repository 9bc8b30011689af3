#include "cpu/backward/config.h"

#include <algorithm>
#include <cmath>

#include "core/rounding.h"
#include "cpu/backward/kernel.h"
#include "cpu/backward/layout.h"
#include "cpu/common/cost.h"
#include "cpu/common/steps.h"
#include "cpu/cpu_facts.h"
#include "plan/work.h"

namespace wh::cpu {
namespace {

// The loads and stores of dk and dv between two tiles are 2 % of the products of 128 rows.
constexpr int64_t kMostTileRows = 128;
constexpr int64_t kMostTileKeys = 384;  // more gain nothing

Config configure(const Query& query) {
  const Problem& p = query.problem;
  Config config;
  config.workers = cpu_facts(query).threads(query.limits.threads);
  // dk and dv are summed tile by tile, so this must not look at the threads. Rows of q and d_out
  // stay in L2 next to one panel.
  const int64_t rows = std::max<int64_t>(1, p.len_q * p.group());
  const int64_t in_l2 = cpu_facts(query).l2_bytes / 3 / ((p.dim_qk + p.dim_v) * 4) / 8 * 8;
  config.tile_q = std::min(round_up(rows, 8), std::clamp<int64_t>(in_l2, 32, kMostTileRows));
  // dq is summed key by key, so this may: three items for each thread.
  const int64_t lanes = kBackwardPanelVectors * cpu_facts(query).simd_floats;
  const auto keys =
      static_cast<int64_t>(static_cast<double>(p.len_k * p.batch) * mean_key_share(p));
  const int64_t shared = keys * p.heads_kv / (3 * config.workers);
  config.tile_k = std::max<int64_t>(1, std::min(kMostTileKeys, shared) / lanes) * lanes;
  return config;
}

// 0.85 of the peak in the products; weights and their gradients take 12 cycles a vector of pairs.
double cycles_of(const Query& query, double pairs) {
  const Problem& p = query.problem;
  const auto dims = static_cast<double>(3 * p.dim_qk + 2 * p.dim_v);
  return pairs / cpu_facts(query).simd_floats * (dims / 2 / 0.85 + 12);
}

double estimate_us(const Query& query, const Config& config) {
  constexpr double kCallUs = 6;
  constexpr double kItem = 3000;
  const Problem& p = query.problem;
  const BackwardShape shape(p, config, cpu_facts(query).simd_floats);
  const double pairs = visible_pairs(p) * sequences(p) * static_cast<double>(p.heads_q);
  // Of sequences of the mean length: others have fewer than the longest, and what is left of theirs
  // has no keys and ends at once.
  const double tiles =
      mean_key_share(p) * static_cast<double>(p.len_k) / static_cast<double>(shape.tile_k);
  const double items = static_cast<double>(shape.heads) * std::ceil(tiles);
  const double at_work =
      std::clamp(items, 1.0, static_cast<double>(std::min(config.workers, cpu_facts(query).cores)));
  return (cycles_of(query, pairs) + items * kItem) * cycle_us(cpu_facts(query)) / at_work + kCallUs;
}

size_t workspace_bytes(const Problem& p, const Config& config) {
  return BackwardWorkspace(p, config, nullptr).bytes();
}

double step_us(const Query& query, const Config& config) {
  const Problem& p = query.problem;
  const double pairs = static_cast<double>(config.tile_q * std::min(config.tile_k, p.len_k));
  return step_us_of(query, config, cycles_of(query, pairs), 0);
}

}  // namespace

const Kernel kBackward{
    .name = "cpu_backward",
    .role = Role::kFused,
    .summary = "gradients with keys on SIMD lanes, summed in a fixed order",
    .pass = Pass::kBackward,
    .takes_all_layouts = true,
    .refusal = [](const Query&) -> std::optional<std::string> { return std::nullopt; },
    .configure = configure,
    .variant = [](const Query& query, const Config&) { return cpu_facts(query).isa + " f32"; },
    .workspace_bytes = workspace_bytes,
    .estimate_us = estimate_us,
    .run = run_backward,
    .step_us = step_us};

}  // namespace wh::cpu
