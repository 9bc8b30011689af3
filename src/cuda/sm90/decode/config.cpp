#include "cuda/sm90/decode/config.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "core/rounding.h"
#include "core/sequence.h"
#include "cuda/combine/combine.h"
#include "cuda/common/packed_rows.h"
#include "cuda/common/variants.h"
#include "cuda/cuda_facts.h"
#include "cuda/instances.h"
#include "cuda/sm90/decode/kernel.h"
#include "cuda/sm90/decode/tiles.h"
#include "cuda/sm90/refusal.h"
#include "cuda/sm90/variant_text.h"
#include "plan/work.h"

namespace wh::cuda {
namespace {

template <Instance kInstance, bool kReadsCodes>
constexpr DecodeVariant variant() {
  constexpr int kDimQk = kInstance.dims.dim_qk, kDimV = kInstance.dims.dim_v;
  using Tile =
      std::conditional_t<kReadsCodes, DecodeCodeTile<kDimQk, kDimV>, DecodeTile<kDimQk, kDimV>>;
  DecodeVariant variant{.instance = kInstance,
                        .tile_k = Tile::kTileK,
                        .threads = Tile::kThreads,
                        .shared_bytes = Tile::kSharedBytes,
                        .blocks_per_sm = Tile::kBlocksPerSm,
                        .functions = {},
                        .reads_codes = kReadsCodes};
  if constexpr (kInstance.is_compiled && kReadsCodes) {
    variant.functions = {decode_code_instance<kDimQk, kDimV, kInstance.dtype, Layouts::kDense>,
                         decode_code_instance<kDimQk, kDimV, kInstance.dtype, Layouts::kAll>};
  } else if constexpr (kInstance.is_compiled) {
    variant.functions = {decode_instance<kDimQk, kDimV, kInstance.dtype, Layouts::kDense>,
                         decode_instance<kDimQk, kDimV, kInstance.dtype, Layouts::kAll>};
  }
  return variant;
}
constexpr auto kVariants = variants_of<kDecodeInstances, kDecodeCodeInstances>(
    []<Instance kInstance, bool kReadsCodes>() { return variant<kInstance, kReadsCodes>(); });

PackedShape shape_of(const Problem& p, int64_t splits) {
  Config config;
  config.tile_q = kDecodeTileQ;
  config.splits = static_cast<int32_t>(splits);
  return {p, config};
}

// The longest sequence by itself.
Problem alone(Problem p) {
  p.batch = std::min<int64_t>(1, p.batch);
  p.total_q = std::min(p.total_q, p.len_q);
  return p;
}

// What a problem costs by the number of shares its keys are cut into. The constants are fits to
// sweeps of that number on an H100: dims 128 to 512, 1K to 256K keys, batch 1 to 20.
class DecodeCost {
 public:
  DecodeCost(const CudaFacts& facts, const DecodeVariant& variant, const Problem& p)
      : sms_(std::max(1, facts.sms)),
        slots_(sms_ * variant.blocks_per_sm),
        gbytes_per_s_(facts.read_gbytes_per_s),
        mean_key_share_(mean_key_share(p)),
        tile_boxes_us_(tile_boxes_us(p, variant)) {
    items_ = shape_of(p, 1).items;
    row_tiles_ = std::max<int64_t>(1, items_ / std::max<int64_t>(1, p.batch * p.heads_kv));
    // A window does not start at a tile's edge.
    const int64_t keys = most_visible_keys(p);
    tiles_ = divide_up(keys, variant.tile_k) + (keys < p.len_k ? 1 : 0);
    const int element_bytes = variant.reads_codes ? 1 : 2;
    tile_work_ = static_cast<double>(variant.tile_k * (p.dim_qk + p.dim_v) * 2);
    tile_bytes_ = static_cast<double>(
        variant.tile_k * (p.dim_qk + (p.values_in_keys ? 0 : p.dim_v)) * element_bytes);
    if (variant.reads_codes) {
      block_rate_ = 2 * code_rate(variant.instance.dims);
      if (p.key_layout == KeyLayout::kPaged) block_rate_ *= kPagedCodes;
      if (p.scales_k != Scales::kTokenHead && p.scales_v != Scales::kTokenHead) {
        block_rate_ *= kNoTokenScales;
      }
    }
    share_bytes_ = static_cast<double>(all_query_rows(p) * p.dim_v * 4);
  }

  int64_t tiles() const { return tiles_; }

  double us(int64_t splits) const {
    const int64_t blocks = items_ * splits;
    const auto share = static_cast<double>(divide_up(tiles_, splits));
    const auto waves = static_cast<double>(blocks / slots_);
    double us = kStartUs + waves * (kBlockUs + share * tile_us(slots_));
    if (blocks % slots_ > 0) us += share * tile_us(blocks % slots_);
    // Written and read again.
    if (splits > 1) us += kCombineUs + static_cast<double>(splits) * share_bytes_ / kCombineRate;
    return us;
  }

  // Of sequences with fewer keys than the most, in so many shares on average.
  double ragged_us(double splits, bool is_balanced) const {
    const double all =
        static_cast<double>(items_ * tiles_) * mean_key_share_ / static_cast<double>(slots_);
    const double longest = std::ceil(static_cast<double>(tiles_) / splits);
    // Shares by total keys leave half a share of a place idle in the end, on average.
    const double tiles =
        is_balanced ? all + all / (2 * ShareRule::kWaves) : std::max(longest, all + longest / 4);
    const double merged = splits > 1 ? kCombineUs + splits * share_bytes_ / kCombineRate : 0;
    return kStartUs + tiles * tile_us(slots_) + merged;
  }

  // The number with the least of it.
  int64_t best_splits() const {
    int64_t best = 1;
    if (items_ == 0) return best;
    for (int64_t splits = 2; splits <= std::min<int64_t>(tiles_, kMostSplits); ++splits) {
      if (us(splits) < us(best)) best = splits;
    }
    return best;
  }

 private:
  static double tile_boxes_us(const Problem& p, const DecodeVariant& variant) {
    const HeadDims dims = variant.instance.dims;
    const int boxes = row_boxes(p, dims.dim_qk) + (p.values_in_keys ? 0 : row_boxes(p, dims.dim_v));
    return boxes_us(p, variant.tile_k / box_keys(p, variant.tile_k) * boxes);
  }

  // A tile of keys while so many blocks run at once: fewer draw less of the bandwidth together, and
  // one alone waits for its own products. Row tiles of a pair share what they read.
  double tile_us(int64_t blocks) const {
    const auto busy = static_cast<double>(blocks);
    const double reached = gbytes_per_s_ * 1e3 * (0.6 + 0.4 * busy / static_cast<double>(slots_));
    const double rate = blocks > sms_ ? block_rate_ * kTwoBlocksGain / 2 : block_rate_;
    return std::max({tile_work_ / rate, tile_boxes_us_,
                     tile_bytes_ * busy / static_cast<double>(row_tiles_) / reached});
  }

  static constexpr double kStartUs = 3;           // launch, and the way to the first keys
  static constexpr double kBlockUs = 0.5;         // between two blocks in one place
  static constexpr double kCombineUs = 1.3;       // launched behind the main kernel
  static constexpr double kCombineRate = 1.25e6;  // bytes a microsecond
  static constexpr double kBlockRate = 34e3;      // of work, counted as if V were read too

  // Codes a microsecond, with scales of tokens, that a lone block widens and multiplies, by an
  // H200: the steps of its consumers, one after another, bound it.
  static constexpr double code_rate(HeadDims dims) {
    return dims.dim_v > 256 ? 17.2e3 : dims.dim_v > 128 ? 18.7e3 : 17.1e3;
  }
  // Of that rate, beside what elements lose over pages too: 0.87 at 128, 0.89 at 512, 0.9 at 256.
  static constexpr double kPagedCodes = 0.88;
  // Between 1.08 at 512 and 1.16 at 128: weights need neither products with scales nor their unit.
  static constexpr double kNoTokenScales = 1.13;

  // What two blocks of a multiprocessor do at once, to what one does. An assumption: where it
  // counts, many rows against few keys, the kernels for prefill are the faster ones anyway.
  static constexpr double kTwoBlocksGain = 1.25;

  int64_t sms_, slots_;  // slots_: blocks that the card runs at once
  double gbytes_per_s_, mean_key_share_;
  double block_rate_ = kBlockRate;
  double tile_boxes_us_;  // what a block takes to ask for the pages of a tile
  int64_t row_tiles_, items_, tiles_;
  double tile_work_, tile_bytes_, share_bytes_;
};

std::optional<std::string> refusal(const Query& query) {
  const Problem& p = query.problem;
  // Heads and batches that share keys are left out of the tensor maps, and their strides with them.
  Problem mapped = p;
  for (Strides* stride : {&mapped.stride_k, &mapped.stride_v}) {
    for (int i = 0; i < 2; ++i) {
      if ((*stride)[i] == 0) (*stride)[i] = 16;
    }
  }
  if (auto reason = sm90_refusal({mapped, query.limits, query.facts})) return reason;
  if (auto reason = variant_refusal(
          kVariants, p, cuda_facts(query),
          is_quantised(p) ? HeadLimits("takes heads of up to 512/512 over codes, these are {}/{}")
                          : HeadLimits("takes heads of up to 576/512, these are {}/{}"))) {
    return reason;
  }
  // Of this kernel, and of the one that merges.
  const int64_t most_blocks =
      std::max(shape_of(p, kMostSplits).blocks, all_query_rows(p) * divide_up(p.dim_v, 128));
  if (most_blocks > std::numeric_limits<int32_t>::max()) {
    return "has too many query rows for one grid";
  }
  return std::nullopt;
}

// Fewer keys of a share do not pay for a block, and more shares of a sequence would cost more
// workspace and merging than they end earlier.
constexpr int64_t kLeastShareKeys = 512, kMostBalancedSplits = 32;

// Whether sequences may have fewer keys than the longest, and a block of rows each. Bits must then
// depend on the batch, since the longer a batch is the longer are its shares.
bool is_balanced(const Query& query) {
  const Problem& p = query.problem;
  const PackedShape shape = shape_of(p, 1);
  return !p.is_dense() && !query.limits.batch_invariant && p.batch > 1 && !shape.has_slots &&
         shape.row_tiles == 1 && (p.has_key_lengths || p.key_layout == KeyLayout::kPacked) &&
         p.window_left == kUnlimited && p.len_k >= 2 * kLeastShareKeys;
}

// The rule for shares looks at the shape and at the card, and at one batch entry alone where bits
// must not depend on the batch.
Config configure(const Query& query) {
  const Problem& p = query.problem;
  Config config;
  config.instance = first_variant(kVariants, p, cuda_facts(query));
  const DecodeVariant& variant = decode_variant(config);
  config.arithmetic = arithmetic_of(p.dtype_q);
  config.tile_q = kDecodeTileQ;
  config.tile_k = variant.tile_k;
  config.fresh_keys = query.limits.fresh_keys;
  const DecodeCost cost(cuda_facts(query), variant, query.limits.batch_invariant ? alone(p) : p);
  const int64_t splits = std::max(cost.best_splits(), least_splits(p));
  if (splits > 1) config.chunk_keys = divide_up(cost.tiles(), splits) * variant.tile_k;
  config.splits = static_cast<int32_t>(splits);
  if (is_balanced(query)) {
    config.workers = cuda_facts(query).sms * variant.blocks_per_sm;
    const int64_t balanced = std::min(kMostBalancedSplits, p.len_k / kLeastShareKeys);
    config.splits = static_cast<int32_t>(std::max(splits, balanced));
  }
  return config;
}

// Shares of the keys of every sequence, where all are as long as the longest can be.
int64_t even_splits(const Problem& p, const Config& config) {
  if (config.workers == 0) return config.splits;
  return config.chunk_keys == 0 ? 1 : divide_up(p.len_k, config.chunk_keys);
}

size_t workspace_bytes(const Problem& p, const Config& config) {
  return Partials::bytes(p, config.splits);
}

double estimate_us(const Query& query, const Config& config) {
  const Problem& p = query.problem;
  const DecodeCost cost(cuda_facts(query), decode_variant(config), p);
  if (mean_key_share(p) == 1) return cost.us(even_splits(p, config));
  if (config.workers == 0) return cost.ragged_us(config.splits, false);
  // A row's shares alone are merged, and the most that one may have are few rows'.
  const ShareRule rule = share_rule(p, config);
  const auto batch = static_cast<int32_t>(p.batch);
  const double splits = static_cast<double>(rule.most_shares(batch)) / batch;
  return cost.ragged_us(std::min<double>(splits, config.splits), true);
}

}  // namespace

const DecodeVariant& decode_variant(const Config& config) {
  return kVariants[static_cast<size_t>(config.instance)];
}

ShareRule share_rule(const Problem& p, const Config& config) {
  ShareRule rule;
  if (config.workers == 0) return rule;
  rule.wave_shares = static_cast<int32_t>(divide_up(config.workers, p.heads_kv));
  rule.most_splits = config.splits;
  rule.even_splits = static_cast<int32_t>(even_splits(p, config));
  rule.least_tiles = static_cast<int32_t>(divide_up(kLeastShareKeys, config.tile_k));
  return rule;
}

const Kernel kSm90Decode{
    .name = "sm90_decode",
    .role = Role::kFused,
    .summary = "few queries, a group packed on one tile, keys split over the SMs",
    .takes_all_layouts = true,
    .refusal = refusal,
    .configure = configure,
    .variant = wgmma_variant<kVariants>,
    .workspace_bytes = workspace_bytes,
    .estimate_us = estimate_us,
    .run = run_decode,
    .reads_quantised = true};

}  // namespace wh::cuda
