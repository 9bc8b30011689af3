#include "cuda/portable/backward/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "core/names.h"
#include "cuda/common/attention_args.h"
#include "cuda/common/variants.h"
#include "cuda/cuda_facts.h"
#include "cuda/gradients/work.h"
#include "cuda/instances.h"
#include "cuda/portable/backward/kernel.h"
#include "plan/names.h"

namespace wh::cuda {
namespace {

template <Instance kInstance>
constexpr PortableBackwardVariant variant_of() {
  constexpr HeadDims kDims = kInstance.dims;
  constexpr auto kElementBytes = static_cast<int>(dtype_bytes(kInstance.dtype));
  static_assert(!has_small_twin<kBackwardInstances>(kInstance) ||
                    backward_depends_on_memory(kDims, kElementBytes),
                "instances.json lists one twice that backward_tile() makes once");
  PortableBackwardVariant variant{
      kInstance, backward_tile(kDims, kElementBytes, Side::kQueries, kInstance.memory),
      backward_tile(kDims, kElementBytes, Side::kKeys, kInstance.memory), nullptr, nullptr};
  if constexpr (kInstance.is_compiled) {
    variant.queries = portable_backward_instance<Side::kQueries, kDims.dim_qk, kDims.dim_v,
                                                 kInstance.dtype, kInstance.memory>;
    variant.keys = portable_backward_instance<Side::kKeys, kDims.dim_qk, kDims.dim_v,
                                              kInstance.dtype, kInstance.memory>;
  }
  return variant;
}
constexpr auto kVariants =
    variants_of<kBackwardInstances>([]<Instance kInstance>() { return variant_of<kInstance>(); });

// The first one that holds the problem and fits the card; -1: there is none.
int32_t best_instance(const Problem& p, const CudaFacts& cuda) {
  return first_variant(kVariants, p, cuda, [&](const PortableBackwardVariant& variant) {
    return variant.shared_bytes() <= cuda.shared_bytes;
  });
}

const PortableBackwardVariant& variant_at(int32_t instance) {
  return kVariants[static_cast<size_t>(instance)];
}

std::optional<std::string> refusal(const Query& query) {
  const Problem& p = query.problem;
  if (p.dtype_q != p.dtype_kv) return "needs q, k and v in one type";
  if (query.limits.precision == Precision::kHigh && p.dtype_q != Dtype::kF32) {
    return "rounds the weights to the input type; precision high forbids that";
  }
  if (auto reason = extent_refusal(p)) return reason;
  const int32_t instance = best_instance(p, cuda_facts(query));
  if (instance < 0) {
    if (best_instance(p, with_all_instances(cuda_facts(query))) >= 0) return not_compiled(p);
    return fmt::format("has no tile of {} heads {}/{} wide that fits {} bytes of shared memory",
                       kDtypes.name(p.dtype_q), p.dim_qk, p.dim_v, cuda_facts(query).shared_bytes);
  }
  if (variant_at(instance).blocks(p).all() > std::numeric_limits<int32_t>::max()) {
    return "has too many query rows or keys for one grid";
  }
  return std::nullopt;
}

// Share of the dense 16-bit rate: on Hopper, whose whole rate needs wgmma, as an H200 measured it
// (f16 and bf16 0.13 to 0.21 up to 256 and 0.08 at 512, f32 0.039, 0.034 and 0.015 at 64, 128 and
// 256). Of other cards assumed.
double share_of_peak(const Query& query, const PortableBackwardVariant& variant) {
  const bool is_hopper = cuda_facts(query).compute_capability == 90;
  const int widest = std::max(variant.instance.dims.dim_qk, variant.instance.dims.dim_v);
  if (variant.instance.dtype == Dtype::kF32) {
    return (is_hopper ? 0.3 : 0.45) * (widest <= 128 ? 0.12 : 0.05);
  }
  return (is_hopper ? 0.17 : 0.45) * (widest <= 256 ? 1 : 0.5);
}

BackwardWork work_of(const Query& query, const PortableBackwardVariant& variant) {
  return {variant.instance.dims, variant.of_queries.rows, variant.of_keys.rows,
          share_of_peak(query, variant)};
}

Config configure(const Query& query) {
  const Problem& p = query.problem;
  Config config;
  config.instance = best_instance(p, cuda_facts(query));
  const PortableBackwardVariant& variant = variant_at(config.instance);
  config.arithmetic = variant.instance.dtype == Dtype::kF32 ? Arithmetic::kTf32x3
                                                            : arithmetic_of(variant.instance.dtype);
  config.tile_q = variant.of_queries.rows;
  config.tile_k = variant.of_keys.rows;
  config.step_tiles = backward_step_tiles(query, work_of(query, variant));
  return config;
}

std::string variant_text(const Query&, const Config& config) {
  const HeadDims dims = variant_at(config.instance).instance.dims;
  return fmt::format("{} mma.sync, {}/{}", kArithmetics.name(config.arithmetic), dims.dim_qk,
                     dims.dim_v);
}

size_t workspace_bytes(const Problem& p, const Config&) {
  Carver carver(nullptr);
  BackwardRows(carver, p);
  return carver.bytes();
}

double estimate_us(const Query& query, const Config& config) {
  const PortableBackwardVariant* variant =
      portable_backward_variant(query.problem, config, cuda_facts(query).shared_bytes);
  if (variant == nullptr) return std::numeric_limits<double>::infinity();
  return backward_us(query, work_of(query, *variant));
}

double step_us(const Query& query, const Config& config) {
  const PortableBackwardVariant* variant =
      portable_backward_variant(query.problem, config, cuda_facts(query).shared_bytes);
  if (variant == nullptr) return std::numeric_limits<double>::infinity();
  return backward_step_us(query, work_of(query, *variant), config.step_tiles);
}

}  // namespace

const PortableBackwardVariant* portable_backward_variant(const Problem& p, const Config& config,
                                                         int64_t shared_bytes) {
  const PortableBackwardVariant& variant = variant_at(config.instance);
  return holds(variant, p) && variant.shared_bytes() <= shared_bytes ? &variant : nullptr;
}
const PortableBackwardVariant* portable_backward_variant(const Problem& p, const CudaFacts& cuda) {
  const int32_t instance = best_instance(p, cuda);
  return instance < 0 ? nullptr : &variant_at(instance);
}

const Kernel kPortableBackward{
    .name = "cuda_portable_backward",
    .role = Role::kFused,
    .summary = "gradients by mma.sync on any card from sm_80 on, dims up to 512, f32 too",
    .pass = Pass::kBackward,
    .takes_all_layouts = true,
    .refusal = refusal,
    .configure = configure,
    .variant = variant_text,
    .workspace_bytes = workspace_bytes,
    .estimate_us = estimate_us,
    .run = run_portable_backward,
    .step_us = step_us};

}  // namespace wh::cuda
