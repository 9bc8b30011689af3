#include "cuda/sm90/backward/config.h"

#include <limits>

#include "cuda/common/tensor_map.h"
#include "cuda/common/variants.h"
#include "cuda/cuda_facts.h"
#include "cuda/gradients/work.h"
#include "cuda/instances.h"
#include "cuda/portable/backward/config.h"
#include "cuda/sm90/backward/kernel.h"
#include "cuda/sm90/refusal.h"
#include "cuda/sm90/variant_text.h"

namespace wh::cuda {
namespace {

template <Instance kInstance>
constexpr GradientVariant variant_of() {
  constexpr HeadDims kDims = kInstance.dims;
  GradientVariant variant{kInstance, {}, {}};
  if constexpr (kInstance.is_compiled) {
    const auto function = [&]<Side kSide, Scores kScores>() {
      return sm90_backward_instance<kSide, kDims.dim_qk, kDims.dim_v, kInstance.dtype, kScores>;
    };
    variant.queries = {function.template operator()<Side::kQueries, Scores::kPlain>(),
                       function.template operator()<Side::kQueries, Scores::kTransformed>()};
    variant.keys = {function.template operator()<Side::kKeys, Scores::kPlain>(),
                    function.template operator()<Side::kKeys, Scores::kTransformed>()};
  }
  return variant;
}
constexpr auto kVariants =
    variants_of<kGradientInstances>([]<Instance kInstance>() { return variant_of<kInstance>(); });

std::optional<std::string> refusal(const Query& query) {
  const Problem& p = query.problem;
  const CudaFacts& cuda = cuda_facts(query);
  if (auto reason = gradient_refusal(query)) return reason;
  if (auto reason = variant_refusal(kVariants, p, cuda,
                                    "holds heads up to 256 wide in registers, not {}/{}")) {
    return reason;
  }
  return takeover_refusal(
      query, kVariants[static_cast<size_t>(first_variant(kVariants, p, cuda))].blocks(p));
}

BackwardWork work_of(const Query& query, const GradientVariant& variant) {
  const HeadDims dims = variant.instance.dims;
  // Between what an H200 reached at 8192 keys without a mask (0.50, 0.65, 0.59, 0.64 and 0.67 at
  // 64, 128, 192/128, 192 and 256; 1070 TFLOP/s) and with causal (0.45, 0.60, 0.56, 0.58, 0.64).
  // What is left of it beside transformed scores is assumed.
  const int dim = dims.dim_qk;
  double share = dim <= 64           ? 0.47
                 : dim <= 128        ? 0.62
                 : dim > 192         ? 0.65
                 : dims.dim_v <= 128 ? 0.57
                                     : 0.61;
  if (scores_of(query.problem) == Scores::kTransformed) share *= 0.65;
  return {dims, gradient_tile(dims, Side::kQueries).rows, gradient_tile(dims, Side::kKeys).rows,
          share};
}

Config configure(const Query& query) {
  const Problem& p = query.problem;
  Config config;
  config.instance = first_variant(kVariants, p, cuda_facts(query));
  const GradientVariant& variant = gradient_variant(config);
  config.arithmetic = arithmetic_of(p.dtype_q);
  config.tile_q = gradient_tile(variant.instance.dims, Side::kQueries).rows;
  config.tile_k = gradient_tile(variant.instance.dims, Side::kKeys).rows;
  config.step_tiles = backward_step_tiles(query, work_of(query, variant));
  return config;
}

double estimate_us(const Query& query, const Config& config) {
  return backward_us(query, work_of(query, gradient_variant(config)));
}

double step_us(const Query& query, const Config& config) {
  return backward_step_us(query, work_of(query, gradient_variant(config)), config.step_tiles);
}

}  // namespace

std::optional<std::string> gradient_refusal(const Query& query) {
  const Problem& p = query.problem;
  if (auto reason = sm90_refusal(query)) return reason;
  if (auto reason = tensor_map_refusal("d_out", p.stride_d_out, p.dim_v)) return reason;
  if (auto reason = store_refusal("dq", p.stride_dq)) return reason;
  if (auto reason = store_refusal("dk", p.stride_dk)) return reason;
  if (p.values_in_keys) return "keeps dk and dv apart; here v lies in k";
  if (auto reason = store_refusal("dv", p.stride_dv)) return reason;
  if (p.mask != MaskKind::kNone) return "reads no array mask";
  return std::nullopt;
}

std::optional<std::string> takeover_refusal(const Query& query, const BackwardBlocks& blocks) {
  if (portable_backward_variant(query.problem, cuda_facts(query)) == nullptr) {
    return not_compiled(query.problem);
  }
  if (blocks.all() > std::numeric_limits<int32_t>::max()) {
    return "has too many query rows or keys for one grid";
  }
  return std::nullopt;
}

size_t gradient_workspace_bytes(const Problem& p, const Config&) {
  Carver carver(nullptr);
  GradientWorkspace(carver, p);
  return carver.bytes();
}

const GradientVariant& gradient_variant(const Config& config) {
  return kVariants[static_cast<size_t>(config.instance)];
}

const Kernel kSm90Backward{.name = "sm90_backward",
                           .role = Role::kFused,
                           .summary = "gradients by TMA and wgmma, heads up to 256 wide",
                           .pass = Pass::kBackward,
                           .takes_all_layouts = true,
                           .refusal = refusal,
                           .configure = configure,
                           .variant = wgmma_variant<kVariants>,
                           .workspace_bytes = gradient_workspace_bytes,
                           .estimate_us = estimate_us,
                           .run = run_sm90_backward,
                           .step_us = step_us};

}  // namespace wh::cuda
