#include "cuda/sm90/backward_wide/config.h"

#include "cuda/common/variants.h"
#include "cuda/cuda_facts.h"
#include "cuda/gradients/work.h"
#include "cuda/instances.h"
#include "cuda/sm90/backward/config.h"
#include "cuda/sm90/backward_wide/kernel.h"
#include "cuda/sm90/variant_text.h"

namespace wh::cuda {
namespace {

template <Instance kInstance>
constexpr WideGradientVariant variant_of() {
  constexpr HeadDims kDims = kInstance.dims;
  WideGradientVariant variant{kInstance, {}, {}, {}};
  if constexpr (kInstance.is_compiled) {
    const auto functions = [&]<Gradient kOf>() {
      return std::array<const void* (*)(), 2>{
          wide_gradient_instance<kOf, kDims.dim_qk, kDims.dim_v, kInstance.dtype, Scores::kPlain>,
          wide_gradient_instance<kOf, kDims.dim_qk, kDims.dim_v, kInstance.dtype,
                                 Scores::kTransformed>};
    };
    variant.dq = functions.template operator()<Gradient::kDq>();
    variant.dk = functions.template operator()<Gradient::kDk>();
    variant.dv = functions.template operator()<Gradient::kDv>();
  }
  return variant;
}
constexpr auto kVariants = variants_of<kWideGradientInstances>(
    []<Instance kInstance>() { return variant_of<kInstance>(); });

std::optional<std::string> refusal(const Query& query) {
  if (auto reason = gradient_refusal(query)) return reason;
  if (auto reason = variant_refusal(kVariants, query.problem, cuda_facts(query),
                                    "holds heads up to 512 wide, not {}/{}")) {
    return reason;
  }
  return takeover_refusal(query, wide_gradient_blocks(query.problem));
}

BackwardWork work_of(const Query& query, const Config& config) {
  // Counted as seven products; an H200 reached 0.45 at 4096 and 8192 keys without a mask and 0.43
  // with causal, of 1070 TFLOP/s; with softcap 0.67 of that.
  double share = 0.44;
  if (scores_of(query.problem) == Scores::kTransformed) share *= 0.67;
  return {.dims = wide_gradient_variant(config).instance.dims,
          .query_rows = kWideGradientRows,
          .key_rows = kWideGradientRows,
          .share = share,
          .block_sms = kWideGradientCluster};
}

Config configure(const Query& query) {
  const Problem& p = query.problem;
  Config config;
  config.instance = first_variant(kVariants, p, cuda_facts(query));
  config.arithmetic = arithmetic_of(p.dtype_q);
  config.tile_q = config.tile_k = kWideGradientTile.rows;
  config.step_tiles = backward_step_tiles(query, work_of(query, config));
  return config;
}

double estimate_us(const Query& query, const Config& config) {
  return backward_us(query, work_of(query, config));
}

double step_us(const Query& query, const Config& config) {
  return backward_step_us(query, work_of(query, config), config.step_tiles);
}

}  // namespace

const WideGradientVariant& wide_gradient_variant(const Config& config) {
  return kVariants[static_cast<size_t>(config.instance)];
}

const Kernel kSm90BackwardWide{.name = "sm90_backward_wide",
                               .role = Role::kFused,
                               .summary = "gradients by TMA and wgmma, heads up to 512 wide",
                               .pass = Pass::kBackward,
                               .takes_all_layouts = true,
                               .refusal = refusal,
                               .configure = configure,
                               .variant = wgmma_variant<kVariants>,
                               .workspace_bytes = gradient_workspace_bytes,
                               .estimate_us = estimate_us,
                               .run = run_sm90_backward_wide,
                               .step_us = step_us};

}  // namespace wh::cuda
