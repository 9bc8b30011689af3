#include "cuda/portable/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <limits>

#include "core/names.h"
#include "core/rounding.h"
#include "core/sequence.h"
#include "cuda/combine/combine.h"
#include "cuda/common/packed_rows.h"
#include "cuda/common/steps.h"
#include "cuda/common/variants.h"
#include "cuda/cuda_facts.h"
#include "cuda/instances.h"
#include "cuda/portable/code_tiles.h"
#include "cuda/portable/few_rows.h"
#include "cuda/portable/kernel.h"
#include "plan/names.h"
#include "plan/work.h"

namespace wh::cuda {
namespace {

constexpr PortableVariant few_rows_variant(const Instance& instance, bool reads_codes) {
  const FewRowsTile tile{instance.dims.dim_v, instance.rows};
  return {instance,
          Cores::kCuda,
          tile.rows,
          FewRowsTile::kKeys,
          1,
          FewRowsTile::kThreads,
          tile.shared_bytes(),
          tile.resident(),
          nullptr,
          reads_codes};
}
constexpr auto kFewRowsVariants = variants_of<kFewRowsInstances>([]<Instance kInstance>() {
  PortableVariant variant = few_rows_variant(kInstance, false);
  if constexpr (kInstance.is_compiled) {
    variant.function = few_rows_instance<kInstance.dims.dim_v, kInstance.rows>;
  }
  return variant;
});
constexpr auto kCodeRowsVariants = variants_of<kCodeRowsInstances>([]<Instance kInstance>() {
  PortableVariant variant = few_rows_variant(kInstance, true);
  if constexpr (kInstance.is_compiled) {
    variant.function = code_rows_instance<kInstance.dims.dim_v, kInstance.rows>;
  }
  return variant;
});

// Over codes too, on the tensor cores where q has 16 bits. What it takes of shared memory is the
// problem's.
constexpr auto kCodeTileVariants = variants_of<kCodeTileInstances>([]<Instance kInstance>() {
  constexpr CodeTile kTile{kInstance.dims.dim_v, kInstance.rows};
  PortableVariant variant{kInstance,
                          Cores::kTensor,
                          kTile.rows,
                          kTile.keys(),
                          16 * kTile.row_tiles(),
                          kTile.threads(),
                          0,
                          kTile.resident(),
                          nullptr,
                          true};
  if constexpr (kInstance.is_compiled) {
    variant.function = code_tiles_instance<kTile.dim_v, kTile.rows>;
  }
  return variant;
});

template <Instance kInstance>
constexpr PortableVariant tensor_variant() {
  constexpr HeadDims kDims = kInstance.dims;
  constexpr auto kElementBytes = static_cast<int>(dtype_bytes(kInstance.dtype));
  static_assert(
      depends_on_memory(kDims, kElementBytes) == has_small_twin<kPortableInstances>(kInstance),
      "instances.json and portable_tile() disagree about the classes of memory");
  constexpr PortableTile kTile = portable_tile(kDims, kElementBytes, kInstance.memory);
  PortableVariant variant{kInstance,   Cores::kTensor,   kTile.rows,
                          kTile.keys,  kTile.warp_rows,  kTile.threads(),
                          kTile.bytes, kTile.resident(), nullptr};
  if constexpr (kInstance.is_compiled) {
    variant.function =
        portable_instance<kDims.dim_qk, kDims.dim_v, kInstance.dtype, kInstance.memory>;
  }
  return variant;
}
constexpr auto kTensorVariants = variants_of<kPortableInstances>(
    []<Instance kInstance>() { return tensor_variant<kInstance>(); });

// Few rows first, where there are few.
constexpr auto kVariants =
    joined(kFewRowsVariants, kTensorVariants, kCodeRowsVariants, kCodeTileVariants);

int64_t items_of(const Problem& p, const PortableVariant& variant) {
  Config config;
  config.tile_q = variant.rows;
  return PackedShape(p, config).items;
}

// One sequence with all that one may have.
Problem one_sequence(Problem p) {
  p.batch = std::min<int64_t>(1, p.batch);
  if (p.query_layout == QueryLayout::kPacked) p.total_q = p.len_q;
  if (p.key_layout == KeyLayout::kPacked) p.total_k = p.len_k;
  if (p.key_layout == KeyLayout::kPaged) p.pages = p.pages_a_sequence();
  return p;
}

// Over codes the most rows of a block take more of them as more blocks.
constexpr int kMostFewRows = 8;

int64_t pair_rows(const Problem& p) { return p.len_q * p.group(); }

bool fits(const PortableVariant& variant, const Problem& p, int64_t shared_bytes) {
  if (variant.reads_code_tiles()) {
    const CodeLayout layout = code_layout(p, variant.code_tile(), shared_bytes);
    // Some heads wider than 256 fit cards of little memory with queries in parts, others do not.
    const bool is_small = shared_bytes < static_cast<int64_t>(SharedMemory::kLarge);
    if (is_small && variant.instance.dims.dim_v > 256 && layout.parts > 1) return false;
    return layout.stages >= 2;
  }
  if (variant.shared_bytes > shared_bytes) return false;
  return variant.cores == Cores::kTensor || pair_rows(p) <= variant.rows ||
         (variant.reads_codes && variant.rows == kMostFewRows);
}

// In what a cache of codes is computed: on tensor cores in bf16, which holds every code, or in f32,
// whatever q is, where elements of other types are beside the codes.
Problem as_computed(Problem p, Precision precision) {
  if (!is_quantised(p)) return p;
  const bool is_all_codes =
      p.quantised_k != Quantised::kNone && (p.values_in_keys || p.quantised_v != Quantised::kNone);
  const bool is_f32 = p.dtype_q == Dtype::kF32 || precision == Precision::kHigh || !is_all_codes;
  p.dtype_q = is_f32 ? Dtype::kF32 : Dtype::kBf16;
  return p;
}

// The first one that holds the problem and fits the card; -1: there is none.
int32_t best_instance(const Problem& p, Precision precision, const CudaFacts& cuda) {
  const Problem computed = as_computed(p, precision);
  const auto first = [&](auto accepts) {
    return first_variant(kVariants, computed, cuda, [&](const PortableVariant& variant) {
      return fits(variant, p, cuda.shared_bytes) && accepts(variant);
    });
  };
  // Tiles of codes for few rows are for more only where those of more find no room.
  const int32_t best = first([&](const PortableVariant& variant) {
    return !variant.reads_code_tiles() || variant.code_tile().key_warps() == 1 ||
           pair_rows(p) <= variant.rows;
  });
  return best >= 0 ? best : first([](const PortableVariant&) { return true; });
}
int32_t best_instance(const Query& query) {
  return best_instance(query.problem, query.limits.precision, cuda_facts(query));
}

const PortableVariant& variant_at(int32_t instance) {
  return kVariants[static_cast<size_t>(instance)];
}

// What a problem costs by the number of shares its keys are cut into. The constants are fits to 110
// problems on an H100, of dims 64 to 576, 16 to 262,144 keys.
class PortableCost {
 public:
  PortableCost(const Query& query, const PortableVariant& variant)
      : sms_(std::max(1, cuda_facts(query).sms)) {
    const Problem& p = query.problem;
    const int64_t row_tiles = divide_up(pair_rows(p), variant.rows);
    items_ = items_of(p, variant);
    const int64_t shared_bytes = cuda_facts(query).shared_bytes;
    const int64_t block_bytes = variant.reads_code_tiles()
                                    ? code_layout(p, variant.code_tile(), shared_bytes).bytes
                                    : variant.shared_bytes;
    resident_ = std::clamp<int64_t>(shared_bytes / block_bytes, 1, variant.resident);
    most_tiles_ = divide_up(most_visible_keys(p), variant.keys);
    // A block alone; a window does not start at a tile's edge.
    const int64_t block_queries = divide_up(variant.rows, std::max<int64_t>(1, p.group())) + 1;
    block_tiles_ =
        std::min(most_tiles_, divide_up(most_visible_keys(p, block_queries), variant.keys) + 1);
    const double keys = visible_pairs(p) / static_cast<double>(std::max<int64_t>(1, p.len_q));
    tiles_ = keys * mean_key_share(p) / variant.keys + 0.5;
    has_even_lengths_ = mean_key_share(p) == 1;
    // Warps without rows skip the products.
    const int64_t rows =
        divide_up(std::min<int64_t>(pair_rows(p), variant.rows), variant.product_rows) *
        variant.product_rows;
    const Parts parts = parts_of(p, variant);
    const double flops = 2.0 * static_cast<double>(rows * variant.keys) *
                         (parts.of_q * variant.instance.dims.dim_qk +
                          parts.of_weights * variant.instance.dims.dim_v);
    product_us_ = flops * static_cast<double>(sms_) / (cuda_facts(query).tensor_tflops * 1e6) *
                  (1 / share(query, variant) + of_scores(query, variant));
    if (variant.reads_codes) {
      const int64_t row_warps = rows / variant.product_rows;
      product_us_ += widened_codes(p, variant, row_tiles == 1 ? row_warps : 1) /
                     codes_per_us(variant, row_warps * resident_);
    }
    const auto element = static_cast<double>(dtype_bytes(p.dtype_q));
    tile_bytes_ =
        variant.keys * (variant.reads_codes ? kv_bytes_a_key(p)
                                            : static_cast<double>(p.dim_qk + p.dim_v) * element);
    const Latency& latency = variant.reads_codes               ? kCodeLatency
                             : variant.cores == Cores::kTensor ? kTensorLatency
                                                               : kCudaLatency;
    lone_tile_us_ = latency.tile_us + latency.us_per_byte * tile_bytes_;
    reads_codes_ = variant.reads_codes;
    runs_in_waves_ = reads_codes_ && has_even_lengths_ && row_tiles == 1;
    bytes_per_us_ = cuda_facts(query).read_gbytes_per_s * 1e3 * latency.reached;
    if (row_tiles > 1) bytes_per_us_ *= kFromL2;
    share_bytes_ = static_cast<double>(all_query_rows(p) * p.dim_v * 4);
  }

  int64_t most_tiles() const { return most_tiles_; }

  double us(int64_t splits) const {
    const int64_t blocks = items_ * splits;
    const int64_t slots = sms_ * resident_;
    // One wave lasts as long as its longest block; many even out.
    const double longest =
        std::ceil(static_cast<double>(most_tiles_) / static_cast<double>(splits));
    const double all = tiles_ / static_cast<double>(splits) * static_cast<double>(blocks) /
                       static_cast<double>(slots);
    const double waited_tiles = runs_in_waves_
                                    ? longest * static_cast<double>(divide_up(blocks, slots))
                                    : std::max(longest, all + longest / 4);
    double us = kStartUs + waited_tiles * tile_us(blocks);
    if (splits > 1) us += kCombineUs + static_cast<double>(splits) * share_bytes_ / kCombineRate;
    return us;
  }

  TileWaves waves(int64_t splits) const {
    const int64_t blocks = items_ * splits;
    const auto tiles = static_cast<double>(divide_up(block_tiles_, splits));
    return {blocks, sms_ * resident_, kStartUs + tiles * tile_us(blocks)};
  }

  int64_t best_splits() const {
    int64_t best = 1;
    // Where the card is full, splitting only ends the longest sequences earlier.
    if (items_ == 0 || (has_even_lengths_ && items_ >= sms_ * resident_)) return best;
    for (int64_t splits = 2; splits <= std::min<int64_t>(most_tiles_, kMostSplits); ++splits) {
      if (us(splits) < us(best)) best = splits;
    }
    return best;
  }

 private:
  // A tile of keys in a block, while so many of those want to run.
  double tile_us(int64_t blocks) const {
    const auto active = static_cast<double>(std::min(blocks, sms_ * resident_));
    const double busy_sms = std::min<double>(active, static_cast<double>(sms_));
    const double memory_us = active * tile_bytes_ / bytes_per_us_;
    // The fullest SM decides, and widening waits for what it widens.
    if (reads_codes_) {
      return std::max(lone_tile_us_ + product_us_ * std::ceil(active / busy_sms), memory_us);
    }
    return std::max({product_us_ * active / busy_sms, lone_tile_us_, memory_us});
  }

  // Share of the dense 16-bit rate, on full tiles.
  static double share(const Query& query, const PortableVariant& variant) {
    // An H100 has a fifteenth of it on the CUDA cores; half of that is left beside the shuffles.
    if (variant.cores == Cores::kCuda) return 1.0 / 30;
    // mma.sync has less than two thirds of Hopper's rate, which needs wgmma.
    const double of_card = cuda_facts(query).compute_capability == 90 ? 0.39 : 0.55;
    const int dim_v = variant.instance.dims.dim_v;
    // Over codes, whose columns are split between warps, an H200 had as much at 512.
    const bool is_wide = dim_v > 256 && !variant.reads_code_tiles();
    if (variant.instance.dtype != Dtype::kF32) return of_card * (is_wide ? 0.6 : 1);
    // Three products at half the rate, and the splitting of their factors.
    return of_card * (dim_v <= 128 ? 0.125 : dim_v <= 256 ? 0.09 : 0.04);
  }

  // What products over tiles of codes are made of: numbers of bf16 that add up to a factor.
  struct Parts {
    int of_q = 1, of_weights = 1;
  };
  static Parts parts_of(const Problem& p, const PortableVariant& variant) {
    if (!variant.reads_code_tiles()) return {};
    const CodeLayout layout = code_layout(p, variant.code_tile(), 0);
    return {layout.parts, layout.parts_p};
  }

  // Of a tile. Warps with other columns of V widen K each for itself. So do those with other rows,
  // which the products of many row tiles hide: with 32 rows in decode on an H200 it took twice the
  // time of one widening.
  static double widened_codes(const Problem& p, const PortableVariant& variant, int64_t row_warps) {
    const double one = variant.keys;
    if (!variant.reads_code_tiles()) return one * static_cast<double>(p.dim_qk + p.dim_v);
    const int times_k = variant.code_tile().column_warps();
    return one * static_cast<double>((p.dim_qk * times_k + p.dim_v) * row_warps);
  }
  // Of an SM, with all that is done for them. Fits to decode on an H200, where f32 queries had 2400
  // of e4m3 and 3200 of q8_0; more rows have not been measured.
  static double codes_per_us(const PortableVariant& variant, int64_t row_warps_an_sm) {
    if (!variant.reads_code_tiles()) return 2900;
    // Schedulers without a warp that has rows widen nothing.
    const CodeTile tile = variant.code_tile();
    const int64_t warps = row_warps_an_sm * tile.key_warps() * tile.column_warps();
    return 8000 * static_cast<double>(std::min<int64_t>(warps, 4)) / 4;
  }

  // What softcap and array masks add to the time of the products, those of 16 bits being 1 / share:
  // the shares that sm90_prefill keeps with them, not measured here. Few rows wait for memory.
  static double of_scores(const Query& query, PortableVariant variant) {
    const Scores scores = scores_of(query.problem);
    if (scores == Scores::kPlain || variant.cores == Cores::kCuda) return 0;
    const double kept = scores == Scores::kMasked ? 0.4 : 0.65;
    variant.instance.dtype = Dtype::kF16;
    return (1 / kept - 1) / share(query, variant);
  }

  // What a block alone waits for.
  struct Latency {
    double tile_us, us_per_byte;  // of a tile of keys: the barriers and the way to K and V
    double reached;               // of the memory's rate, once all SMs read
  };
  static constexpr Latency kTensorLatency{2, 0.085 / 1024, 0.45};
  static constexpr Latency kCudaLatency{0.72, 0.015 / 1024, 0.95};
  static constexpr Latency kCodeLatency{0.6, 0, 0.8};

  static constexpr double kStartUs = 6;
  static constexpr double kFromL2 = 2;  // where row tiles share what they read
  static constexpr double kCombineUs = 2;
  static constexpr double kCombineRate = 1e6;  // bytes a microsecond

  int64_t sms_, items_, resident_, most_tiles_, block_tiles_;
  bool has_even_lengths_;
  bool reads_codes_;
  // Blocks of decode over codes are alike, and those that find no room start when the others end:
  // one sequence in 158 shares, 26 more than there were SMs, took 184 us.
  bool runs_in_waves_;
  double tiles_, product_us_, tile_bytes_, lone_tile_us_, bytes_per_us_, share_bytes_;
};

std::optional<std::string> refusal(const Query& query) {
  const Problem& p = query.problem;
  if (p.dtype_q != p.dtype_kv && !is_quantised(p)) return "needs q, k and v in one type";
  if (query.limits.precision == Precision::kHigh &&
      as_computed(p, query.limits.precision).dtype_q != Dtype::kF32) {
    return "rounds the weights to the input type; precision high forbids that";
  }
  if (auto reason = extent_refusal(p)) return reason;
  const Precision precision = query.limits.precision;
  const int32_t instance = best_instance(query);
  if (instance < 0) {
    if (best_instance(p, precision, with_all_instances(cuda_facts(query))) >= 0) {
      return not_compiled(p);
    }
    const bool is_f32 = as_computed(p, precision).dtype_q == Dtype::kF32;
    if (is_quantised(p) && (is_f32 || p.dim_qk > 576 || p.dim_v > 512)) {
      return fmt::format("reads codes of heads up to {} wide in {}, these are {}/{}",
                         is_f32 ? "256/256" : "576/512", is_f32 ? "f32" : "16 bits", p.dim_qk,
                         p.dim_v);
    }
    return fmt::format("has no tile of {} heads {}/{} wide that fits {} bytes of shared memory",
                       kDtypes.name(p.dtype_q), p.dim_qk, p.dim_v, cuda_facts(query).shared_bytes);
  }
  const PortableVariant& variant = variant_at(instance);
  // Blocks of this kernel, and of the one that merges.
  const int64_t most_blocks =
      std::max(items_of(p, variant) * kMostSplits, all_query_rows(p) * divide_up(p.dim_v, 128));
  if (std::max(most_blocks, pair_rows(p)) > std::numeric_limits<int32_t>::max()) {
    return "has too many query rows for one grid";
  }
  return std::nullopt;
}

Arithmetic arithmetic(const PortableVariant& variant) {
  const bool splits_f32 = variant.cores == Cores::kTensor && variant.instance.dtype == Dtype::kF32;
  return splits_f32 ? Arithmetic::kTf32x3 : arithmetic_of(variant.instance.dtype);
}

Config configure(const Query& query) {
  const Problem& p = query.problem;
  Config config;
  config.instance = best_instance(query);
  const PortableVariant& variant = variant_at(config.instance);
  config.arithmetic = arithmetic(variant);
  config.tile_q = variant.rows;
  config.tile_k = variant.keys;
  // One sequence alone decides where bits must not depend on the batch.
  const Problem deciding = query.limits.batch_invariant ? one_sequence(p) : p;
  const PortableCost cost({deciding, query.limits, query.facts, query.correction}, variant);
  const int64_t splits = std::max(cost.best_splits(), least_splits(p));
  if (splits > 1) config.chunk_keys = divide_up(cost.most_tiles(), splits) * variant.keys;
  config.splits = static_cast<int32_t>(splits);
  if (query.limits.longest_step_us > 0) {
    const PortableCost all(query, variant);
    config.step_tiles = choose_step_tiles(query, all.waves(splits), all.us(splits));
  }
  return config;
}

// "3xTF32 mma.sync, 128/128"
std::string variant_text(const Query&, const Config& config) {
  const PortableVariant& variant = variant_at(config.instance);
  const HeadDims dims = variant.instance.dims;
  return fmt::format("{} {}, {}/{}{}", kArithmetics.name(config.arithmetic),
                     variant.cores == Cores::kCuda ? "CUDA cores" : "mma.sync", dims.dim_qk,
                     dims.dim_v,
                     variant.reads_code_tiles() ? ", codes widened in registers"
                     : variant.reads_codes      ? ", codes widened as they are read"
                                                : "");
}

size_t workspace_bytes(const Problem& p, const Config& config) {
  return Partials::bytes(p, config.splits);
}

double estimate_us(const Query& query, const Config& config) {
  const Problem& p = query.problem;
  const PortableVariant* variant = portable_variant(p, config, cuda_facts(query).shared_bytes);
  if (variant == nullptr) return std::numeric_limits<double>::infinity();
  return PortableCost(query, *variant).us(config.splits);
}

double step_us(const Query& query, const Config& config) {
  const Problem& p = query.problem;
  const PortableVariant* variant = portable_variant(p, config, cuda_facts(query).shared_bytes);
  if (variant == nullptr) return std::numeric_limits<double>::infinity();
  const PortableCost cost(query, *variant);
  return step_us_of(cost.waves(config.splits), config.step_tiles, cost.us(config.splits));
}

}  // namespace

const PortableVariant* portable_variant(const Problem& p, const Config& config,
                                        int64_t shared_bytes) {
  const PortableVariant& variant = variant_at(config.instance);
  const bool holds_it = holds(variant, as_computed(p, Precision::kNative)) ||
                        holds(variant, as_computed(p, Precision::kHigh));
  return holds_it && fits(variant, p, shared_bytes) ? &variant : nullptr;
}

const Kernel kPortable{
    .name = "cuda_portable",
    .role = Role::kFused,
    .summary = "mma.sync and cp.async on any card from sm_80 on, any dimensions, f32 too",
    .takes_all_layouts = true,
    .refusal = refusal,
    .configure = configure,
    .variant = variant_text,
    .workspace_bytes = workspace_bytes,
    .estimate_us = estimate_us,
    .run = run_portable,
    .step_us = step_us,
    .reads_quantised = true};

}  // namespace wh::cuda
