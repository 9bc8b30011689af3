#include "cuda/sm90/prefill/config.h"

#include <fmt/format.h>

#include <algorithm>

#include "cuda/combine/combine.h"
#include "cuda/common/variants.h"
#include "cuda/cuda_facts.h"
#include "cuda/instances.h"
#include "cuda/sm90/prefill/kernel.h"
#include "cuda/sm90/query_tiles.h"
#include "cuda/sm90/refusal.h"

namespace wh::cuda {
namespace {

template <Instance kInstance>
constexpr PrefillVariant variant() {
  PrefillVariant variant{kInstance, {}};
  if constexpr (kInstance.is_compiled) {
    constexpr HeadDims kDims = kInstance.dims;
    variant.function = {
        prefill_instance<kDims.dim_qk, kDims.dim_v, kInstance.dtype, Scores::kPlain>,
        prefill_instance<kDims.dim_qk, kDims.dim_v, kInstance.dtype, Scores::kTransformed>,
        prefill_instance<kDims.dim_qk, kDims.dim_v, kInstance.dtype, Scores::kMasked>};
  }
  return variant;
}
constexpr auto kVariants =
    variants_of<kPrefillInstances>([]<Instance kInstance>() { return variant<kInstance>(); });

std::optional<std::string> refusal(const Query& query) {
  const Problem& p = query.problem;
  if (auto reason = sm90_refusal(query)) return reason;
  if (least_splits(p) > 1) return kWritesTypeOfQ;
  if (first_variant(kVariants, p, cuda_facts(query)) < 0) {
    if (first_variant(kVariants, p, with_all_instances(cuda_facts(query))) >= 0)
      return not_compiled(p);
    return fmt::format("holds heads up to 256 wide, or 320/256, in registers, not {}/{}", p.dim_qk,
                       p.dim_v);
  }
  return tile_count_refusal(p);
}

// Share of the dense tensor rate that the main loop reaches on full tiles, measured on an H100
// (2 x 16 heads, 8192 square; 900 TFLOP/s). Up to 192, times what taking turns gained since.
struct Rate {
  HeadDims dims;
  double share;
};
constexpr Rate kRates[] = {{{64, 64}, 0.58},   {{80, 80}, 0.53},   {{96, 96}, 0.61},
                           {{112, 112}, 0.69}, {{128, 128}, 0.77}, {{160, 160}, 0.76},
                           {{192, 128}, 0.82}, {{192, 192}, 0.86}, {{192, 256}, 0.77},
                           {{256, 256}, 0.85}, {{320, 256}, 0.74}};

TileCost cost_of(const Config& config) {
  const HeadDims dims = prefill_variant(config).instance.dims;
  double share = 0.5;
  for (const Rate& rate : kRates) {
    if (rate.dims == dims) share = rate.share;
  }
  return {.dims = dims,
          .tile_q = static_cast<int32_t>(config.tile_q),
          .tile_k = static_cast<int32_t>(config.tile_k),
          .workers = config.workers,
          .worker_sms = 1,
          .share = share};
}

TileOrder order_of(const Problem& p, const Config& config) {
  return tile_order(p, static_cast<int32_t>(config.tile_q), 1);
}

double estimate_us(const Query& query, const Config& config) {
  return estimate_tiles_us(query, order_of(query.problem, config), cost_of(config));
}

TileWaves waves_of(const Query& query, const Config& config) {
  return tile_waves(query, order_of(query.problem, config), cost_of(config));
}

Config configure(const Query& query) {
  const Problem& p = query.problem;
  Config config;
  config.instance = first_variant(kVariants, p, cuda_facts(query));
  const PrefillTile tile = prefill_tile(prefill_variant(config).instance.dims, scores_of(p));
  config.arithmetic = arithmetic_of(p.dtype_q);
  config.tile_q = tile.tile_q();
  config.tile_k = tile.tile_k;
  config.workers = std::max(1, std::min(cuda_facts(query).sms, order_of(p, config).tiles));
  if (query.limits.longest_step_us > 0) {
    config.step_tiles =
        choose_step_tiles(query, waves_of(query, config), estimate_us(query, config));
  }
  return config;
}

size_t workspace_bytes(const Problem& p, const Config& config) {
  return claims_tiles(p, order_of(p, config).tiles, config.workers) ? kTileCounterBytes : 0;
}

double step_us(const Query& query, const Config& config) {
  return step_us_of(waves_of(query, config), config.step_tiles, estimate_us(query, config));
}

}  // namespace

const PrefillVariant& prefill_variant(const Config& config) {
  return kVariants[static_cast<size_t>(config.instance)];
}

const Kernel kSm90Prefill{.name = "sm90_prefill",
                          .role = Role::kFused,
                          .summary = "TMA and wgmma, heads up to 256 wide, 128 or 192 rows a block",
                          .refusal = refusal,
                          .configure = configure,
                          .variant = wgmma_variant,
                          .workspace_bytes = workspace_bytes,
                          .estimate_us = estimate_us,
                          .run = run_prefill,
                          .step_us = step_us};

}  // namespace wh::cuda
