#include "cuda/sm90/prefill_wide/config.h"

#include "cuda/common/variants.h"
#include "cuda/cuda_facts.h"
#include "cuda/instances.h"
#include "cuda/sm90/prefill_wide/kernel.h"
#include "cuda/sm90/variant_text.h"

namespace wh::cuda {
namespace {

constexpr auto kVariants = tile_variants<kWideInstances, kWideCodeInstances>(
    []<HeadDims kDims, Dtype kDtype, Scores kScores, Layouts kLayouts, bool kReadsCodes>() {
      if constexpr (kReadsCodes && kScores == Scores::kMasked) {
        return nullptr;
      } else if constexpr (kReadsCodes) {
        return wide_code_instance<kDims.dim_qk, kDims.dim_v, kDtype, kScores, kLayouts>;
      } else {
        return wide_instance<kDims.dim_qk, kDims.dim_v, kDtype, kScores, kLayouts>;
      }
    });

std::optional<std::string> refusal(const Query& query) {
  const Problem& p = query.problem;
  if (auto reason = tile_refusal(query)) return reason;
  if (is_quantised(p) && scores_of(p) == Scores::kMasked) {
    return "takes no array masks over codes: their addresses need registers that widening has";
  }
  return variant_refusal(
      kVariants, p, cuda_facts(query),
      is_quantised(p) ? HeadLimits("widens codes of heads up to 512 wide, not {}/{}")
                      : HeadLimits("holds queries up to 576 and values up to 512 wide, not {}/{}"));
}

// Of the dense tensor rate, measured on an H100, over codes on an H200.
double share_of(const Problem& p) {
  constexpr double kShare = 0.61;
  if (!is_quantised(p)) return kShare;
  const bool has_tokens = p.scales_k == Scales::kTokenHead || p.scales_v == Scales::kTokenHead;
  return kShare * 0.56 * (has_tokens ? 0.96 : 1);
}

TileWork work_of(const Problem& p, const Config& config) {
  const TileVariant& variant = wide_variant(config);
  const WideTile tile = wide_tile_of(p, variant);
  return {.order = wide_order(p, tile),
          .dims = variant.instance.dims,
          .worker_rows = tile.cluster * kWideTileQ,
          .worker_sms = tile.cluster,
          .box_keys = box_keys(p, kWideValueRows),
          .share = share_of(p)};
}

Config configure(const Query& query) {
  const Problem& p = query.problem;
  Config config;
  config.instance = first_variant(kVariants, p, cuda_facts(query));
  config.arithmetic = arithmetic_of(p.dtype_q);
  config.tile_q = kWideTileQ;
  config.tile_k = wide_tile_of(p, wide_variant(config)).tile_k;
  deal_tiles(query, work_of(p, config), config);
  return config;
}

}  // namespace

const TileVariant& wide_variant(const Config& config) {
  return kVariants[static_cast<size_t>(config.instance)];
}

WideTile wide_tile_of(const Problem& p, const TileVariant& variant) {
  const Scores scores = scores_of(p);
  return wide_tile(variant.instance.dims, scores,
                   compiled_layouts(variant.reads_codes, scores, layouts_of(p)),
                   variant.reads_codes ? Stored::kCodes : Stored::kElements);
}

// Two heads of a group, at least, where there are two, in a cluster: the cluster's blocks then have
// the same queries and the same keys under a causal mask. The cluster's tile is split between its
// blocks by queries, each with all the packed heads.
TileOrder wide_order(const Problem& p, const WideTile& tile) {
  const int32_t least_packed = tile.cluster > 1 && p.group() % 2 == 0 ? 2 : 1;
  return tile_order(p, kWideTileQ, least_packed, tile.cluster);
}

const Kernel kSm90PrefillWide{
    .name = "sm90_prefill_wide",
    .role = Role::kFused,
    .summary = "TMA multicast and wgmma, heads up to 576/512, 64 rows a block",
    .takes_all_layouts = true,
    .refusal = refusal,
    .configure = configure,
    .variant = wgmma_variant<kVariants>,
    .workspace_bytes = workspace_bytes_by<work_of>,
    .estimate_us = estimate_us_by<work_of>,
    .run = run_prefill_wide,
    .step_us = step_us_by<work_of>,
    .reads_quantised = true};

}  // namespace wh::cuda
