#include "cuda/sm90/prefill/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "cuda/sm90/prefill/kernel.h"
#include "cuda/sm90/refusal.h"
#include "plan/work.h"

namespace wh::cuda {
namespace {

constexpr size_t kCounterBytes = 16;

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

PrefillTile tile_of(const Problem& p) {
  return prefill_tile(kPrefillDims[prefill_dims_index(p)], scores_of(p));
}

std::optional<std::string> refusal(const Query& query) {
  const Problem& p = query.problem;
  if (auto reason = sm90_refusal(query)) return reason;
  if (prefill_dims_index(p) < 0) {
    return fmt::format("holds heads up to 256 wide in registers, not {}/{}", p.dim_qk, p.dim_v);
  }
  constexpr int64_t kMostTiles = int64_t{1} << 30;
  if (p.batch * p.heads_q * divide_up(p.len_q, 64) > kMostTiles) {
    return fmt::format("counts tiles by int32: at most {} query tiles", kMostTiles);
  }
  return std::nullopt;
}

Config configure(const Query& query) {
  const Problem& p = query.problem;
  const PrefillTile tile = tile_of(p);
  Config config;
  config.variant = p.dtype_q == Dtype::kF16 ? "wgmma f16" : "wgmma bf16";
  config.tile_q = tile.tile_q();
  config.tile_k = tile.tile_k;
  config.threads = std::max(1, std::min(query.cuda.sms, prefill_order(p, tile).tiles));
  return config;
}

size_t workspace_bytes(const Problem& p, const Config& config) {
  return prefill_claims_tiles(p, prefill_order(p, tile_of(p)), config.threads) ? kCounterBytes : 0;
}

// Share of the dense tensor rate that the main loop reaches on full tiles, measured on an H100
// (8192 square; 900 TFLOP/s nominal).
struct Rate {
  HeadDims dims;
  double share;
};
constexpr Rate kRates[] = {{{64, 64}, 0.58},   {{80, 80}, 0.58},   {{96, 96}, 0.66},
                           {{112, 112}, 0.72}, {{128, 128}, 0.76}, {{160, 160}, 0.80},
                           {{192, 128}, 0.81}, {{192, 192}, 0.86}, {{192, 256}, 0.84},
                           {{256, 256}, 0.84}};

double estimate_us(const Query& query, const Config& config) {
  const Problem& p = query.problem;
  const int index = prefill_dims_index(p);
  const HeadDims dims = kPrefillDims[index];
  const TileOrder order = prefill_order(p, tile_of(p));
  double share = 0.5;
  for (const Rate& rate : kRates) {
    if (rate.dims == dims) share = rate.share;
  }
  if (scores_of(p) == Scores::kTransformed) share *= 0.8;
  if (scores_of(p) == Scores::kMasked) share *= 0.5;
  const double tflops = query.cuda.tensor_tflops * share;
  const double block_flops_per_us = tflops * 1e6 / std::max(1, query.cuda.sms);
  // Keys of a query on average and at most, rounded up to tiles that are half masked.
  const double keys = p.len_q == 0 ? 0
                                   : visible_pairs(p) / static_cast<double>(p.len_q) +
                                         static_cast<double>(config.tile_k) / 2;
  const double flops_a_key = 2.0 * (dims.dim_qk + dims.dim_v) * static_cast<double>(config.tile_q);
  const double tile_us = keys * flops_a_key / block_flops_per_us + 1.0;
  const double rounds = static_cast<double>(order.tiles) / std::max(1, config.threads);
  const bool is_even = !prefill_claims_tiles(p, order, config.threads);
  // Tiles dealt in turn end together; claimed ones leave about half a tile idle.
  return tile_us * (is_even ? std::max(1.0, static_cast<double>(divide_up(
                                                order.tiles, std::max(1, config.threads))))
                            : rounds + 0.5) +
         4;
}

}  // namespace

int prefill_dims_index(const Problem& p) {
  int best = -1;
  for (int i = 0; i < static_cast<int>(std::size(kPrefillDims)); ++i) {
    const HeadDims dims = kPrefillDims[i];
    if (p.dim_qk > dims.dim_qk || p.dim_v > dims.dim_v) continue;
    if (best < 0 ||
        dims.dim_qk + dims.dim_v < kPrefillDims[best].dim_qk + kPrefillDims[best].dim_v) {
      best = i;
    }
  }
  return best;
}

TileOrder prefill_order(const Problem& p, PrefillTile tile) {
  TileOrder order{};
  const int64_t group = std::max<int64_t>(1, p.group());
  const auto tiles_with = [&](int64_t packed) {
    return divide_up(p.len_q, tile.tile_q() / packed) * (group / packed);
  };
  // Packing heads costs address arithmetic and fills tiles of short queries; 5 % pays.
  int64_t packed = 1;
  for (int64_t heads = 2; heads <= std::min<int64_t>(group, tile.tile_q()); ++heads) {
    if (group % heads != 0) continue;
    if (tiles_with(heads) * 20 < tiles_with(packed) * 19) packed = heads;
  }
  order.packed_heads = static_cast<int32_t>(packed);
  order.tile_queries = static_cast<int32_t>(tile.tile_q() / packed);
  order.query_tiles = static_cast<int32_t>(divide_up(p.len_q, order.tile_queries));
  order.head_sets = static_cast<int32_t>(p.batch * p.heads_q / packed);
  order.tiles = order.query_tiles * order.head_sets;
  // K and V of a section fit in two thirds of the 50 MB of L2.
  constexpr int64_t kSectionBytes = 32 << 20;
  const int64_t head_bytes = std::max<int64_t>(1, p.len_k * (p.dim_qk + p.dim_v) * 2);
  const int64_t heads_kv = std::max<int64_t>(1, kSectionBytes / head_bytes);
  order.section_sets = static_cast<int32_t>(
      std::clamp<int64_t>(heads_kv * (group / packed), 1, std::max(1, order.head_sets)));
  return order;
}

bool prefill_claims_tiles(const Problem& p, const TileOrder& order, int32_t blocks) {
  return order.tiles > blocks &&
         (p.causal != Causal::kNone || p.window_left != kUnlimited ||
          p.window_right != kUnlimited || p.has_key_lengths || p.has_key_starts);
}

const Kernel kSm90Prefill{"sm90_prefill",
                          Device::kCuda,
                          true,
                          "TMA and wgmma, heads up to 256 wide, 128 or 192 rows a tile",
                          refusal,
                          configure,
                          workspace_bytes,
                          estimate_us,
                          run_prefill};

}  // namespace wh::cuda
