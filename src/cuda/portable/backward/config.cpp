#include "cuda/portable/backward/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "core/names.h"
#include "cuda/common/attention_args.h"
#include "cuda/common/steps.h"
#include "cuda/common/variants.h"
#include "cuda/cuda_facts.h"
#include "cuda/instances.h"
#include "cuda/portable/backward/kernel.h"
#include "plan/names.h"
#include "plan/work.h"

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

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

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
  if (!fits_int32(p)) {
    return fmt::format("indexes heads and lengths by int32: at most {} each", kMaxExtent);
  }
  const int32_t instance = best_instance(p, cuda_facts(query));
  if (instance < 0) {
    if (best_instance(p, with_all_instances(cuda_facts(query))) >= 0) return not_compiled(p);
    return fmt::format("has no tile of {} heads {}/{} wide that fits {} bytes of shared memory",
                       kDtypes.name(p.dtype_q), p.dim_qk, p.dim_v, cuda_facts(query).shared_bytes);
  }
  if (BackwardBlocks(p, variant_at(instance)).all() > std::numeric_limits<int32_t>::max()) {
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

constexpr double kStartUs = 12;  // of three launches or four

double tile_us(const Query& query, const PortableBackwardVariant& variant, double pairs) {
  const HeadDims dims = variant.instance.dims;
  const double sm_tflops = cuda_facts(query).tensor_tflops / std::max(1, cuda_facts(query).sms);
  return pairs * (2.0 * dims.dim_qk + 1.75 * dims.dim_v) * 2 /
         (sm_tflops * 1e6 * share_of_peak(query, variant));
}

// The longest block: one that meets all that some tile may see.
double block_us(const Query& query, const PortableBackwardVariant& variant) {
  const Problem& p = query.problem;
  const double of_queries =
      static_cast<double>(variant.of_queries.rows) *
      static_cast<double>(std::min(p.len_k, most_visible_keys(p, variant.of_queries.rows)));
  const double of_keys =
      static_cast<double>(variant.of_keys.rows) * static_cast<double>(p.len_q * p.group());
  return tile_us(query, variant, std::max(of_queries, of_keys));
}

double us_of(const Query& query, const PortableBackwardVariant& variant) {
  const Problem& p = query.problem;
  const BackwardBlocks blocks(p, variant);
  // Rows of a tile cost what they cost, there or not; a diagonal's tile is half empty.
  const auto padded = [](int64_t length, int rows) {
    return static_cast<double>(divide_up(length, rows) * rows);
  };
  const double pairs = visible_pairs(p) / std::max<double>(1, static_cast<double>(p.len_q)) *
                       padded(p.len_q, 16) * static_cast<double>(p.batch * p.heads_q);
  const double sms = std::max(1, cuda_facts(query).sms);
  const double all = 2 * tile_us(query, variant, pairs) / sms;
  return kStartUs + std::max(all, block_us(query, variant));
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
  if (query.limits.longest_step_us > 0) {
    const TileWaves waves{BackwardBlocks(p, variant).all(), std::max(1, cuda_facts(query).sms),
                          kStartUs + block_us(query, variant)};
    config.step_tiles = choose_step_tiles(query, waves, us_of(query, variant));
  }
  return config;
}

std::string variant_text(const Query&, const Config& config) {
  const HeadDims dims = variant_at(config.instance).instance.dims;
  return fmt::format("{} mma.sync, {}/{}", kArithmetics.name(config.arithmetic), dims.dim_qk,
                     dims.dim_v);
}

size_t workspace_bytes(const Problem& p, const Config&) { return BackwardRows(nullptr, p).bytes; }

double estimate_us(const Query& query, const Config& config) {
  const PortableBackwardVariant* variant =
      portable_backward_variant(query.problem, config, cuda_facts(query).shared_bytes);
  if (variant == nullptr) return std::numeric_limits<double>::infinity();
  return us_of(query, *variant);
}

double step_us(const Query& query, const Config& config) {
  const PortableBackwardVariant* variant =
      portable_backward_variant(query.problem, config, cuda_facts(query).shared_bytes);
  if (variant == nullptr) return std::numeric_limits<double>::infinity();
  const TileWaves waves{BackwardBlocks(query.problem, *variant).all(),
                        std::max(1, cuda_facts(query).sms), kStartUs + block_us(query, *variant)};
  return step_us_of(waves, config.step_tiles, us_of(query, *variant));
}

}  // namespace

BackwardBlocks::BackwardBlocks(const Problem& p, const PortableBackwardVariant& variant)
    : query_tiles(divide_up(p.len_q, variant.of_queries.rows)),
      key_tiles(divide_up(p.len_k, variant.of_keys.rows)),
      queries(p.batch * p.heads_q * query_tiles),
      keys(p.batch * p.heads_kv * key_tiles) {}

const PortableBackwardVariant* portable_backward_variant(const Problem& p, const Config& config,
                                                         int64_t shared_bytes) {
  const PortableBackwardVariant& variant = variant_at(config.instance);
  return holds(variant.instance, p) && variant.shared_bytes() <= shared_bytes ? &variant : nullptr;
}

const Kernel kPortableBackward{
    .name = "cuda_portable_backward",
    .role = Role::kFused,
    .summary = "gradients by mma.sync on any card from sm_80 on, dims up to 512, f32 too",
    .pass = Pass::kBackward,
    .refusal = refusal,
    .configure = configure,
    .variant = variant_text,
    .workspace_bytes = workspace_bytes,
    .estimate_us = estimate_us,
    .run = run_portable_backward,
    .step_us = step_us};

}  // namespace wh::cuda
