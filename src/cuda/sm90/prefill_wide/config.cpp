#include "cuda/sm90/prefill_wide/config.h"

#include "cuda/common/variants.h"
#include "cuda/cuda_facts.h"
#include "cuda/instances.h"
#include "cuda/sm90/prefill_wide/kernel.h"
#include "cuda/sm90/variant_text.h"

namespace wh::cuda {
namespace {

constexpr auto kVariants = tile_variants<kWideInstances>(
    []<HeadDims kDims, Dtype kDtype, Scores kScores, Layouts kLayouts, bool>() {
      return wide_instance<kDims.dim_qk, kDims.dim_v, kDtype, kScores, kLayouts>;
    });

std::optional<std::string> refusal(const Query& query) {
  if (auto reason = tile_refusal(query)) return reason;
  return variant_refusal(kVariants, query.problem, cuda_facts(query),
                         "holds queries up to 576 and values up to 512 wide, not {}/{}");
}

TileWork work_of(const Problem& p, const Config& config) {
  return {.order = wide_order(p),
          .dims = wide_variant(config).instance.dims,
          .worker_rows = kWideCluster * kWideTileQ,
          .worker_sms = kWideCluster,
          .box_keys = box_keys(p, kWideValueRows),
          .share = 0.61};  // of the dense tensor rate, measured on an H100
}

Config configure(const Query& query) {
  const Problem& p = query.problem;
  Config config;
  config.instance = first_variant(kVariants, p, cuda_facts(query));
  config.arithmetic = arithmetic_of(p.dtype_q);
  config.tile_q = kWideTileQ;
  config.tile_k = wide_tile(wide_variant(config).instance.dims, scores_of(p), layouts_of(p)).tile_k;
  deal_tiles(query, work_of(p, config), config);
  return config;
}

}  // namespace

const TileVariant& wide_variant(const Config& config) {
  return kVariants[static_cast<size_t>(config.instance)];
}

// Two heads of a group, at least, where there are two: the cluster's blocks then have the same
// queries and the same keys under a causal mask. The cluster's tile is split between its blocks by
// queries, each with all the packed heads.
TileOrder wide_order(const Problem& p) {
  return tile_order(p, kWideTileQ, p.group() % 2 == 0 ? 2 : 1, kWideCluster);
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
    .step_us = step_us_by<work_of>};

}  // namespace wh::cuda
