#include "cuda/sm90/prefill_wide/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "cuda/sm90/prefill_wide/kernel.h"
#include "cuda/sm90/query_tiles.h"
#include "cuda/sm90/refusal.h"

namespace wh::cuda {
namespace {

WideTile tile_of(const Problem& p) {
  return wide_tile(kWideDims[wide_dims_index(p)], scores_of(p));
}

std::optional<std::string> refusal(const Query& query) {
  const Problem& p = query.problem;
  if (auto reason = sm90_refusal(query)) return reason;
  if (wide_dims_index(p) < 0) {
    return fmt::format("holds queries up to 576 and values up to 512 wide, not {}/{}", p.dim_qk,
                       p.dim_v);
  }
  return tile_count_refusal(p);
}

TileCost cost_of(const Problem& p, const Config& config) {
  return {.dims = kWideDims[wide_dims_index(p)],
          .tile_q = kWideCluster * kWideTileQ,
          .tile_k = static_cast<int32_t>(config.tile_k),
          .workers = config.workers,
          .worker_sms = kWideCluster,
          .share = 0.61};  // of the dense tensor rate, measured on an H100
}

double estimate_us(const Query& query, const Config& config) {
  const Problem& p = query.problem;
  return estimate_tiles_us(query, wide_order(p), cost_of(p, config));
}

TileWaves waves_of(const Query& query, const Config& config) {
  const Problem& p = query.problem;
  return tile_waves(query, wide_order(p), cost_of(p, config));
}

Config configure(const Query& query) {
  const Problem& p = query.problem;
  Config config;
  config.arithmetic = arithmetic_of(p.dtype_q);
  config.tile_q = kWideTileQ;
  config.tile_k = tile_of(p).tile_k;
  const int32_t clusters = std::min(query.cuda.sms / kWideCluster, wide_order(p).tiles);
  config.workers = std::max(1, clusters);
  if (query.limits.longest_step_us > 0) {
    config.step_tiles =
        choose_step_tiles(query, waves_of(query, config), estimate_us(query, config));
  }
  return config;
}

size_t workspace_bytes(const Problem& p, const Config& config) {
  return claims_tiles(p, wide_order(p).tiles, config.workers) ? kTileCounterBytes : 0;
}

double step_us(const Query& query, const Config& config) {
  return step_us_of(waves_of(query, config), config.step_tiles, estimate_us(query, config));
}

}  // namespace

int wide_dims_index(const Problem& p) {
  for (int i = 0; i < static_cast<int>(std::size(kWideDims)); ++i) {
    if (p.dim_qk <= kWideDims[i].dim_qk && p.dim_v <= kWideDims[i].dim_v) return i;
  }
  return -1;
}

// Two heads of a group, at least, where there are two: the cluster's blocks then have the same
// queries and the same keys under a causal mask. The cluster's tile is split between its blocks by
// queries, each with all the packed heads.
TileOrder wide_order(const Problem& p) {
  TileOrder order = tile_order(p, kWideTileQ, p.group() % 2 == 0 ? 2 : 1);
  order.tile_queries *= kWideCluster;
  order.query_tiles = (order.query_tiles + kWideCluster - 1) / kWideCluster;
  order.tiles = order.query_tiles * order.head_sets;
  return order;
}

const Kernel kSm90PrefillWide{
    .name = "sm90_prefill_wide",
    .device = Device::kCuda,
    .role = Role::kFused,
    .summary = "TMA multicast and wgmma, heads up to 576/512, 64 rows a block",
    .refusal = refusal,
    .configure = configure,
    .variant = wgmma_variant,
    .workspace_bytes = workspace_bytes,
    .estimate_us = estimate_us,
    .run = run_prefill_wide,
    .step_us = step_us};

}  // namespace wh::cuda
