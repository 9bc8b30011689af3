#include "cuda/sm90/prefill_wide/config.h"

#include <fmt/format.h>

#include <algorithm>

#include "cuda/combine/combine.h"
#include "cuda/common/variants.h"
#include "cuda/cuda_facts.h"
#include "cuda/instances.h"
#include "cuda/sm90/prefill_wide/kernel.h"
#include "cuda/sm90/query_tiles.h"
#include "cuda/sm90/refusal.h"

namespace wh::cuda {
namespace {

template <Instance kInstance>
constexpr WideVariant variant() {
  WideVariant variant{kInstance, {}};
  if constexpr (kInstance.is_compiled) {
    constexpr HeadDims kDims = kInstance.dims;
    variant.function = {
        wide_instance<kDims.dim_qk, kDims.dim_v, kInstance.dtype, Scores::kPlain>,
        wide_instance<kDims.dim_qk, kDims.dim_v, kInstance.dtype, Scores::kTransformed>,
        wide_instance<kDims.dim_qk, kDims.dim_v, kInstance.dtype, Scores::kMasked>};
  }
  return variant;
}
constexpr auto kVariants =
    variants_of<kWideInstances>([]<Instance kInstance>() { return variant<kInstance>(); });

std::optional<std::string> refusal(const Query& query) {
  const Problem& p = query.problem;
  if (auto reason = sm90_refusal(query)) return reason;
  if (least_splits(p) > 1) return kWritesTypeOfQ;
  if (first_variant(kVariants, p, cuda_facts(query)) < 0) {
    if (first_variant(kVariants, p, with_all_instances(cuda_facts(query))) >= 0)
      return not_compiled(p);
    return fmt::format("holds queries up to 576 and values up to 512 wide, not {}/{}", p.dim_qk,
                       p.dim_v);
  }
  return tile_count_refusal(p);
}

TileCost cost_of(const Config& config) {
  return {.dims = wide_variant(config).instance.dims,
          .tile_q = kWideCluster * kWideTileQ,
          .tile_k = static_cast<int32_t>(config.tile_k),
          .workers = config.workers,
          .worker_sms = kWideCluster,
          .share = 0.61};  // of the dense tensor rate, measured on an H100
}

double estimate_us(const Query& query, const Config& config) {
  return estimate_tiles_us(query, wide_order(query.problem), cost_of(config));
}

TileWaves waves_of(const Query& query, const Config& config) {
  return tile_waves(query, wide_order(query.problem), cost_of(config));
}

Config configure(const Query& query) {
  const Problem& p = query.problem;
  Config config;
  config.instance = first_variant(kVariants, p, cuda_facts(query));
  config.arithmetic = arithmetic_of(p.dtype_q);
  config.tile_q = kWideTileQ;
  config.tile_k = wide_tile(wide_variant(config).instance.dims, scores_of(p)).tile_k;
  const int32_t clusters = std::min(cuda_facts(query).sms / kWideCluster, wide_order(p).tiles);
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

const WideVariant& wide_variant(const Config& config) {
  return kVariants[static_cast<size_t>(config.instance)];
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
