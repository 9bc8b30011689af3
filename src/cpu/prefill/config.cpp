#include "cpu/prefill/config.h"

#include <algorithm>
#include <cmath>

#include "cpu/prefill/kernel.h"
#include "cpu/rounding.h"
#include "plan/work.h"

namespace wh::cpu {
namespace {

int64_t panel_lanes(int64_t simd_floats) { return kPanelVectors * simd_floats; }

std::optional<std::string> refusal(const Query&) { return std::nullopt; }

double estimate_us(const Query& query, const Config& config) {
  const Problem& p = query.problem;
  const int64_t lanes = panel_lanes(query.cpu.simd_floats);
  const double rows = static_cast<double>(p.len_q * p.group());
  const double filled =
      rows / static_cast<double>(round_up(std::max<int64_t>(1, p.len_q * p.group()), lanes / 3));
  const double threads = std::min<double>(config.threads, query.cpu.cores);
  const double gflops = query.cpu.gflops_per_core * threads * 0.8 * std::max(filled, 0.02);
  const double softmax_us = visible_pairs(p) * static_cast<double>(p.batch * p.heads_q) * 12 /
                            (query.cpu.gflops_per_core * threads * 1e3);
  return useful_flops(p) / (gflops * 1e3) + softmax_us +
         kv_bytes(p) / (query.cpu.read_gbytes_per_s * 1e3) * 0.1 + 5;
}

// Of one item: the keys of its chunk against a full tile of rows.
double step_us(const Query& query, const Config& config) {
  const double items =
      static_cast<double>(PrefillShape(query.problem, config, query.cpu.simd_floats).items);
  const double threads = std::min<double>(config.threads, query.cpu.cores);
  // Causal items differ: the longest see twice the mean.
  const double longest = query.problem.causal == Causal::kNone ? 1 : 2;
  return estimate_us(query, config) / std::max(1.0, items / threads) * longest;
}

// Q and O panels of an item should stay in L2 next to one K and V tile; 768 rows are enough to
// hide the widening of K and V (3 % of the time), fewer than one panel makes no sense.
Config configure(const Query& query) {
  const Problem& p = query.problem;
  Config config;
  config.variant = query.cpu.isa + " f32";
  config.threads = query.cpu.threads(query.limits.threads);
  const int64_t lanes = panel_lanes(query.cpu.simd_floats);
  const int64_t dims = p.dim_qk + p.dim_v;
  config.tile_k = std::clamp<int64_t>(query.cpu.l2_bytes / 4 / (dims * 4), 32, 96) / 8 * 8;
  const int64_t rows_in_l2 = query.cpu.l2_bytes * 3 / 5 / (dims * 4);
  const int64_t rows_per_head = p.len_q * p.group();
  config.tile_q = std::clamp<int64_t>(rows_in_l2 / lanes * lanes, lanes, 768 / lanes * lanes);
  config.tile_q = std::min(config.tile_q, round_up(std::max<int64_t>(rows_per_head, 1), lanes));
  // Even tiles: 1.1 tiles of work would otherwise cost two.
  const int64_t tiles = std::max<int64_t>(1, divide_up(rows_per_head, config.tile_q));
  config.tile_q = round_up(std::max<int64_t>(1, divide_up(rows_per_head, tiles)), lanes);
  // Split keys only while there are too few items for a big machine, and never so finely that
  // writing and merging partial rows shows (under 1 % from 4096 keys a chunk on). The rule looks
  // at the shape and not at the threads: the bits of a row must not depend on those. Behind a
  // window most chunks would be empty.
  if (most_visible_keys(p) < p.len_k) return config;
  const int64_t batch = query.limits.batch_invariant ? 1 : p.batch;
  const int64_t items = std::max<int64_t>(1, batch * p.heads_kv * tiles);
  const int64_t least = items < 8 ? 1024 : 4096;
  int64_t wanted = std::min(divide_up(64, items), p.len_k / least);
  if (const double limit_us = query.limits.longest_step_us; limit_us > 0) {
    const double item_us = step_us(query, config);
    wanted = std::max(wanted, static_cast<int64_t>(std::ceil(item_us / limit_us)));
    wanted = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, p.len_k / config.tile_k));
  }
  if (wanted > 1) config.chunk_keys = round_up(divide_up(p.len_k, wanted), config.tile_k);
  return config;
}

size_t workspace_bytes(const Problem& p, const Config& config) {
  return PrefillWorkspace(p, config, PrefillArithmetic::kF32, nullptr).bytes(config.threads);
}

Status run(const Launch& launch) { return run_prefill(launch); }

}  // namespace

const Kernel kPrefill{"cpu_prefill",
                      Device::kCpu,
                      true,
                      "queries on SIMD lanes, grouped heads folded into rows",
                      refusal,
                      configure,
                      workspace_bytes,
                      estimate_us,
                      run,
                      step_us};

}  // namespace wh::cpu
