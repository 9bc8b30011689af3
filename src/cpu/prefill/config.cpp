#include "cpu/prefill/config.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/prefill/kernel.h"
#include "cpu/rounding.h"
#include "plan/work.h"

namespace wh::cpu {
namespace {

// 96 keys: fewer cost 3-5 % in rescaling O, more gain nothing and leave no L1 for the scores.
constexpr int64_t kMostTileKeys = 96;
// Beyond 768 rows the widening of K and V (1 % of the time there) has nothing left to save.
constexpr int64_t kMostTileRows = 768;
constexpr int64_t kRowsWorthAChunk = 768;

int64_t panel_lanes(const Query& query) { return kPanelVectors * query.cpu.simd_floats; }

double threads_at_work(const Query& query, const Config& config) {
  return std::min<double>(config.threads, query.cpu.cores);
}

// Rows whose Q and O panels stay in L2 next to one K and V tile.
int64_t most_tile_rows(const Query& query, PrefillArithmetic arithmetic) {
  const Problem& p = query.problem;
  const int64_t q_rows = arithmetic == PrefillArithmetic::kF32 ? p.dim_qk : divide_up(p.dim_qk, 2);
  const int64_t lanes = panel_lanes(query);
  const int64_t in_l2 = query.cpu.l2_bytes * 3 / 5 / ((q_rows + p.dim_v) * 4);
  return std::clamp(in_l2 / lanes * lanes, lanes, kMostTileRows / lanes * lanes);
}

// Splits keys only while there are too few items for a big machine, and never so finely that
// writing and merging partial rows shows (under 1 % from 4096 keys a chunk on). The rule looks at
// the shape and not at the threads: the bits of a row must not depend on those. Behind a window
// most chunks would be empty.
int64_t chunk_keys(const Query& query, const Config& config, PrefillArithmetic arithmetic) {
  const Problem& p = query.problem;
  if (most_visible_keys(p) < p.len_k) return 0;
  const int64_t batch = query.limits.batch_invariant ? 1 : p.batch;
  const int64_t items =
      std::max<int64_t>(1, batch * p.heads_kv * divide_up(p.len_q * p.group(), kRowsWorthAChunk));
  const int64_t least = items < 8 ? 1024 : 4096;
  int64_t wanted = std::min(divide_up(64, items), p.len_k / least);
  if (const double limit_us = query.limits.longest_step_us; limit_us > 0) {
    const double item_us = prefill_step_us(query, config, arithmetic);
    wanted = std::max(wanted, static_cast<int64_t>(std::ceil(item_us / limit_us)));
    wanted = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, p.len_k / config.tile_k));
  }
  return wanted > 1 ? round_up(divide_up(p.len_k, wanted), config.tile_k) : 0;
}

Config configure(const Query& query) {
  return configure_prefill(query, PrefillArithmetic::kF32, query.cpu.isa + " f32");
}

size_t workspace_bytes(const Problem& p, const Config& config) {
  return PrefillWorkspace(p, config, PrefillArithmetic::kF32, nullptr).bytes(config.threads);
}

double estimate_us(const Query& query, const Config& config) {
  return prefill_estimate_us(query, config, PrefillArithmetic::kF32);
}

double step_us(const Query& query, const Config& config) {
  return prefill_step_us(query, config, PrefillArithmetic::kF32);
}

}  // namespace

Config configure_prefill(const Query& query, PrefillArithmetic arithmetic, std::string variant) {
  const Problem& p = query.problem;
  Config config;
  config.variant = std::move(variant);
  config.threads = query.cpu.threads(query.limits.threads);
  const int64_t tile_bytes_a_key = (p.dim_qk + p.dim_v) * 4;
  config.tile_k =
      std::clamp<int64_t>(query.cpu.l2_bytes / 4 / tile_bytes_a_key, 32, kMostTileKeys) / 8 * 8;
  const int64_t lanes = panel_lanes(query);
  const int64_t rows = std::max<int64_t>(1, p.len_q * p.group());
  int64_t tiles = divide_up(rows, most_tile_rows(query, arithmetic));
  config.tile_q = round_up(divide_up(rows, tiles), lanes);
  config.chunk_keys = chunk_keys(query, config, arithmetic);
  // Four items a thread balance the load, but an item of less than three panels widens K and V for
  // too few rows. A row's bits do not depend on its tile, so this may look at the threads.
  const int64_t items_a_tile =
      std::max<int64_t>(1, PrefillShape(p, config, query.cpu.simd_floats).items / tiles);
  tiles = std::max(
      tiles, std::min(divide_up(4 * config.threads, items_a_tile), divide_up(rows, 3 * lanes)));
  config.tile_q = round_up(divide_up(rows, tiles), lanes);
  return config;
}

double prefill_estimate_us(const Query& query, const Config& config, PrefillArithmetic arithmetic) {
  const Problem& p = query.problem;
  const double rows = static_cast<double>(p.len_q * p.group());
  const double filled =
      rows / static_cast<double>(
                 round_up(std::max<int64_t>(1, p.len_q * p.group()), query.cpu.simd_floats));
  const double threads = threads_at_work(query, config);
  const double gflops_per_core = arithmetic == PrefillArithmetic::kF32
                                     ? query.cpu.gflops_per_core
                                     : query.cpu.bf16_gflops_per_core;
  const double share = arithmetic == PrefillArithmetic::kBf16High ? 0.8 / 1.5 : 0.8;
  const double gflops = gflops_per_core * threads * share * std::max(filled, 0.02);
  const double softmax_us = visible_pairs(p) * static_cast<double>(p.batch * p.heads_q) * 12 /
                            (query.cpu.gflops_per_core * threads * 1e3);
  return useful_flops(p) / (gflops * 1e3) + softmax_us +
         kv_bytes(p) / (query.cpu.read_gbytes_per_s * 1e3) * 0.1 + 5;
}

// Of one item: the keys of its chunk against a full tile of rows.
double prefill_step_us(const Query& query, const Config& config, PrefillArithmetic arithmetic) {
  const double items =
      static_cast<double>(PrefillShape(query.problem, config, query.cpu.simd_floats).items);
  const double threads = threads_at_work(query, config);
  // Causal items differ: the longest see twice the mean.
  const double longest = query.problem.causal == Causal::kNone ? 1 : 2;
  return prefill_estimate_us(query, config, arithmetic) / std::max(1.0, items / threads) * longest;
}

const Kernel kPrefill{"cpu_prefill",
                      Device::kCpu,
                      true,
                      "queries on SIMD lanes, grouped heads folded into rows",
                      [](const Query&) -> std::optional<std::string> { return std::nullopt; },
                      configure,
                      workspace_bytes,
                      estimate_us,
                      run_prefill,
                      step_us};

}  // namespace wh::cpu
