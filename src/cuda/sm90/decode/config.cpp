#include "cuda/sm90/decode/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "core/names.h"
#include "cuda/combine/combine.h"
#include "cuda/sm90/decode/kernel.h"
#include "cuda/sm90/decode/tiles.h"
#include "cuda/sm90/refusal.h"
#include "plan/work.h"

namespace wh::cuda {
namespace {

template <int kDimQk, int kDimV>
constexpr DecodeVariant variant() {
  using Tile = DecodeTile<kDimQk, kDimV>;
  return {kDimQk,
          kDimV,
          Tile::kTileK,
          Tile::kThreads,
          Tile::kSharedBytes,
          decode_instance<kDimQk, kDimV, Dtype::kF16>,
          decode_instance<kDimQk, kDimV, Dtype::kBf16>};
}

// Narrowest first. src/cuda/CMakeLists.txt compiles one file for each of these and each type.
constexpr DecodeVariant kVariants[] = {
    variant<64, 64>(),   variant<128, 128>(), variant<192, 128>(), variant<192, 192>(),
    variant<256, 256>(), variant<512, 512>(), variant<576, 512>()};

// Costs beside the reading of K and V, measured on an H100.
constexpr double kLaunchUs = 2.5;
constexpr double kRampUs = 1.2;     // of a block, until its first keys arrive
constexpr double kCombineUs = 2.5;  // launched behind the main kernel

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

int64_t row_tiles(const Problem& p) { return divide_up(p.len_q * p.group(), kDecodeTileQ); }

// One block's time for a tile of keys: its share of the memory bandwidth, or the tensor cores at
// the half of their peak that a lone warpgroup's serial steps leave.
double tile_us(const Query& query, const DecodeVariant& variant) {
  const Problem& p = query.problem;
  const double sms = std::max(1, query.cuda.sms);
  const double bytes = static_cast<double>(variant.tile_k * (p.dim_qk + p.dim_v) * 2);
  const double flops =
      static_cast<double>(kDecodeTileQ * variant.tile_k) * 2 *
      static_cast<double>(variant.dim_qk * (variant.dim_v > 256 ? 2 : 1) + variant.dim_v);
  // Row tiles of one pair read the same keys at the same time, all but one of them from L2.
  const double read_us = bytes / static_cast<double>(std::max<int64_t>(1, row_tiles(p))) /
                         (query.cuda.read_gbytes_per_s / sms * 1e3);
  const double l2_us = bytes / (query.cuda.read_gbytes_per_s * 1.8 / sms * 1e3);
  const double tensor_us = flops / (query.cuda.tensor_tflops * 0.5 / sms * 1e6);
  return std::max({read_us, l2_us, tensor_us});
}

int64_t most_tiles(const Problem& p, const DecodeVariant& variant) {
  // A window does not start at a tile's edge.
  const int64_t keys = most_visible_keys(p);
  return divide_up(keys, variant.tile_k) + (keys < p.len_k ? 1 : 0);
}

// Blocks run in waves of one a multiprocessor.
double blocks_us(double tile_us, int64_t items, int64_t tiles, int64_t splits, int64_t sms) {
  const auto waves = static_cast<double>(divide_up(items * splits, sms));
  const auto share = static_cast<double>(divide_up(tiles, splits));
  return waves * (kRampUs + share * tile_us) + (splits > 1 ? kCombineUs : 0);
}

std::optional<std::string> refusal(const Query& query) {
  const Problem& p = query.problem;
  // Heads and batches that share keys are left out of the tensor maps, and their strides with them.
  Problem mapped = p;
  for (Strides* stride : {&mapped.stride_k, &mapped.stride_v}) {
    for (int i = 0; i < 2; ++i) {
      if ((*stride)[i] == 0) (*stride)[i] = 8;
    }
  }
  if (auto reason = sm90_refusal({mapped, query.limits, query.cpu, query.cuda})) return reason;
  if (decode_variant(p) == nullptr) {
    return fmt::format("takes heads of up to 576/512, these are {}/{}", p.dim_qk, p.dim_v);
  }
  const int64_t most_blocks = p.batch * p.heads_kv * row_tiles(p) * kMostSplits;
  if (most_blocks > std::numeric_limits<int32_t>::max()) {
    return "has too many query rows for one grid";
  }
  return std::nullopt;
}

// As many shares of the keys as make the waves shortest. The rule looks at the shape and at the
// card, and at one batch entry alone where bits must not depend on the batch.
Config configure(const Query& query) {
  const Problem& p = query.problem;
  const DecodeVariant& variant = *decode_variant(p);
  Config config;
  config.variant =
      fmt::format("{} wgmma, {}/{}", kDtypes.name(p.dtype_q), variant.dim_qk, variant.dim_v);
  config.tile_q = kDecodeTileQ;
  config.tile_k = variant.tile_k;
  config.fresh_keys = query.limits.fresh_keys;
  const int64_t batch = query.limits.batch_invariant ? std::min<int64_t>(1, p.batch) : p.batch;
  const int64_t items = batch * p.heads_kv * row_tiles(p);
  const int64_t tiles = most_tiles(p, variant);
  const int64_t sms = std::max(1, query.cuda.sms);
  const double us = tile_us(query, variant);
  int64_t best = 1;
  if (items > 0) {
    for (int64_t splits = 2; splits <= std::min<int64_t>(tiles, kMostSplits); ++splits) {
      if (blocks_us(us, items, tiles, splits, sms) < blocks_us(us, items, tiles, best, sms)) {
        best = splits;
      }
    }
  }
  if (best > 1) config.chunk_keys = divide_up(tiles, best) * variant.tile_k;
  config.threads = static_cast<int32_t>(p.batch * p.heads_kv * row_tiles(p) * best);
  return config;
}

size_t workspace_bytes(const Problem& p, const Config& config) {
  const auto splits = static_cast<int32_t>(DecodeShape(p, config).splits);
  return Partials::at(nullptr, p, splits).bytes();
}

double estimate_us(const Query& query, const Config& config) {
  const Problem& p = query.problem;
  const DecodeVariant& variant = *decode_variant(p);
  const DecodeShape shape(p, config);
  if (shape.items == 0) return kLaunchUs;
  return kLaunchUs + blocks_us(tile_us(query, variant), shape.items, most_tiles(p, variant),
                               shape.splits, std::max(1, query.cuda.sms));
}

Status run(const Launch& launch) { return run_decode(launch); }

}  // namespace

std::span<const DecodeVariant> decode_variants() { return kVariants; }

const DecodeVariant* decode_variant(const Problem& p) {
  for (const DecodeVariant& variant : kVariants) {
    if (p.dim_qk <= variant.dim_qk && p.dim_v <= variant.dim_v) return &variant;
  }
  return nullptr;
}

DecodeShape::DecodeShape(const Problem& p, const Config& config)
    : row_tiles(cuda::row_tiles(p)),
      items(p.batch * p.heads_kv * row_tiles),
      splits(items > 0 ? config.threads / items : 1),
      blocks(items * splits) {}

const Kernel kSm90Decode{"sm90_decode",
                         Device::kCuda,
                         true,
                         "few queries, a group packed on one tile, keys split over the SMs",
                         refusal,
                         configure,
                         workspace_bytes,
                         estimate_us,
                         run};

}  // namespace wh::cuda
