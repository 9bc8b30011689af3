#include "cuda/sm90/prefill/config.h"

#include "cuda/common/variants.h"
#include "cuda/cuda_facts.h"
#include "cuda/instances.h"
#include "cuda/sm90/prefill/kernel.h"
#include "cuda/sm90/variant_text.h"

namespace wh::cuda {
namespace {

constexpr auto kVariants = tile_variants<kPrefillInstances, kPrefillCodeInstances>(
    []<HeadDims kDims, Dtype kDtype, Scores kScores, Layouts kLayouts, bool kReadsCodes>() {
      if constexpr (kReadsCodes) {
        return prefill_code_instance<kDims.dim_qk, kDims.dim_v, kDtype, kScores, kLayouts>;
      } else {
        return prefill_instance<kDims.dim_qk, kDims.dim_v, kDtype, kScores, kLayouts>;
      }
    });

std::optional<std::string> refusal(const Query& query) {
  const Problem& p = query.problem;
  if (auto reason = tile_refusal(query)) return reason;
  return variant_refusal(
      kVariants, p, cuda_facts(query),
      is_quantised(p)
          ? HeadLimits("holds heads up to 256 wide in registers, not {}/{}")
          : HeadLimits("holds heads up to 256 wide, or 320/256, in registers, not {}/{}"));
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

// Of what the main loop is reckoned to reach over elements, by an H200 (tiles.h says what bounds
// it). Scales of tokens are multiplied into scores and weights.
double code_share(const Problem& p, HeadDims dims) {
  const bool is_narrow = dims.dim_v <= 64, is_wide = dims.dim_v > 128;
  double share = is_narrow ? 0.76 : is_wide ? 0.8 : 0.9;
  if (p.quantised_k == Quantised::kInt8) share *= 0.93;
  const bool has_tokens = p.scales_k == Scales::kTokenHead || p.scales_v == Scales::kTokenHead;
  return share * (!has_tokens ? 1 : is_narrow ? 0.78 : is_wide ? 0.86 : 0.84);
}

TileWork work_of(const Problem& p, const Config& config) {
  const TileVariant& variant = prefill_variant(config);
  const HeadDims dims = variant.instance.dims;
  double share = 0.5;
  for (const Rate& rate : kRates) {
    if (rate.dims == dims) share = rate.share;
  }
  if (variant.reads_codes) share *= code_share(p, dims);
  const auto tile_q = static_cast<int32_t>(config.tile_q);
  return {.order = tile_order(p, tile_q, 1),
          .dims = dims,
          .worker_rows = tile_q,
          .worker_sms = 1,
          .box_keys = box_keys(p, static_cast<int32_t>(config.tile_k)),
          .share = share};
}

Config configure(const Query& query) {
  const Problem& p = query.problem;
  Config config;
  config.instance = first_variant(kVariants, p, cuda_facts(query));
  const PrefillTile tile = prefill_tile_of(p, prefill_variant(config));
  config.arithmetic = arithmetic_of(p.dtype_q);
  config.tile_q = tile.tile_q();
  config.tile_k = tile.tile_k;
  deal_tiles(query, work_of(p, config), config);
  return config;
}

}  // namespace

PrefillTile prefill_tile_of(const Problem& p, const TileVariant& variant) {
  const Scores scores = scores_of(p);
  return prefill_tile(variant.instance.dims, scores,
                      compiled_layouts(variant.reads_codes, scores, layouts_of(p)),
                      variant.reads_codes ? Stored::kCodes : Stored::kElements);
}

const TileVariant& prefill_variant(const Config& config) {
  return kVariants[static_cast<size_t>(config.instance)];
}

const Kernel kSm90Prefill{.name = "sm90_prefill",
                          .role = Role::kFused,
                          .summary = "TMA and wgmma, heads up to 256 wide, 128 or 192 rows a block",
                          .takes_all_layouts = true,
                          .refusal = refusal,
                          .configure = configure,
                          .variant = wgmma_variant<kVariants>,
                          .workspace_bytes = workspace_bytes_by<work_of>,
                          .estimate_us = estimate_us_by<work_of>,
                          .run = run_prefill,
                          .step_us = step_us_by<work_of>,
                          .reads_quantised = true};

}  // namespace wh::cuda
