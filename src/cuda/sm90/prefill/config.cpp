#include "cuda/sm90/prefill/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "cuda/sm90/prefill/kernel.h"
#include "cuda/sm90/query_tiles.h"
#include "cuda/sm90/refusal.h"

namespace wh::cuda {
namespace {

HeadDims dims_of(const Problem& p) { return kPrefillDims[prefill_dims_index(p)]; }
PrefillTile tile_of(const Problem& p) { return prefill_tile(dims_of(p), scores_of(p)); }

std::optional<std::string> refusal(const Query& query) {
  const Problem& p = query.problem;
  if (auto reason = sm90_refusal(query)) return reason;
  if (prefill_dims_index(p) < 0) {
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

TileCost cost_of(const Problem& p, const Config& config) {
  const HeadDims dims = dims_of(p);
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

TileOrder order_of(const Problem& p) { return tile_order(p, tile_of(p).tile_q(), 1); }

double estimate_us(const Query& query, const Config& config) {
  const Problem& p = query.problem;
  return estimate_tiles_us(query, order_of(p), cost_of(p, config));
}

TileWaves waves_of(const Query& query, const Config& config) {
  const Problem& p = query.problem;
  return tile_waves(query, order_of(p), cost_of(p, config));
}

Config configure(const Query& query) {
  const Problem& p = query.problem;
  const PrefillTile tile = tile_of(p);
  Config config;
  config.arithmetic = arithmetic_of(p.dtype_q);
  config.tile_q = tile.tile_q();
  config.tile_k = tile.tile_k;
  config.workers = std::max(1, std::min(query.cuda.sms, order_of(p).tiles));
  if (query.limits.longest_step_us > 0) {
    config.step_tiles =
        choose_step_tiles(query, waves_of(query, config), estimate_us(query, config));
  }
  return config;
}

size_t workspace_bytes(const Problem& p, const Config& config) {
  return claims_tiles(p, order_of(p).tiles, config.workers) ? kTileCounterBytes : 0;
}

double step_us(const Query& query, const Config& config) {
  return step_us_of(waves_of(query, config), config.step_tiles, estimate_us(query, config));
}

}  // namespace

int prefill_dims_index(const Problem& p) {
  int best = -1;
  for (int i = 0; i < static_cast<int>(std::size(kPrefillDims)); ++i) {
    const HeadDims dims = kPrefillDims[i];
    if (p.dim_qk > dims.dim_qk || p.dim_v > dims.dim_v) continue;
    if (best < 0 ||
        dims.dim_qk + dims.dim_v < kPrefillDims[best].dim_qk + kPrefillDims[best].dim_v) {
      best = i;
    }
  }
  return best;
}

const Kernel kSm90Prefill{.name = "sm90_prefill",
                          .device = Device::kCuda,
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
