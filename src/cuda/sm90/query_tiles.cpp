#include "cuda/sm90/query_tiles.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/rounding.h"
#include "cuda/combine/combine.h"
#include "cuda/common/attention_args.h"
#include "cuda/cuda_facts.h"
#include "cuda/sm90/common/panels.h"
#include "cuda/sm90/refusal.h"
#include "plan/work.h"

namespace wh::cuda {
namespace {

// What no profile makes faster: its points are of few workers over dense keys, and at 16 x 8192
// keys of 32/8 heads of 128 they promised an H200 95 us for what its memory takes 124 to read.
double uncorrected(const Query& query, double us) { return us / std::min(1.0, query.correction); }

// To ask for the pages of so many keys. The blocks of a cluster ask for a part each.
double asked_us(const Query& query, const TileWork& work, double keys) {
  const Problem& p = query.problem;
  const int boxes = row_boxes(p, work.dims.dim_qk) + row_boxes(p, work.dims.dim_v);
  return uncorrected(query, boxes_us(p, keys / work.box_keys * boxes / work.worker_sms));
}

// A worker's, of a tile whose queries see so many keys, those of cut tiles included.
double tile_us(const Query& query, const TileWork& work, double keys) {
  double share = work.share;
  if (scores_of(query.problem) == Scores::kTransformed) share *= 0.65;
  if (scores_of(query.problem) == Scores::kMasked) share *= 0.4;
  // An H100 under load runs at 0.84 of the boost clock that its driver names.
  constexpr double kSustained = 0.84;
  const double worker_flops_per_us = cuda_facts(query).tensor_tflops * kSustained * share * 1e6 *
                                     work.worker_sms / std::max(1, cuda_facts(query).sms);
  double products_us =
      keys * 2.0 * (work.dims.dim_qk + work.dims.dim_v) * work.worker_rows / worker_flops_per_us;
  // Widening bounds these, and a profile's points are over elements.
  if (is_quantised(query.problem)) products_us = uncorrected(query, products_us);
  return std::max(products_us, asked_us(query, work, keys)) + 1.0;
}

// Tiles that read more than they multiply reach 0.95 of the card's rate: an H200 took 135 to 147 us
// for 16 x 8192 keys of 32/8 heads of 128, which it reads in 124.
double read_us(const Query& query) {
  const double bytes_per_us = 0.95e3 * std::max(1.0, cuda_facts(query).read_gbytes_per_s);
  return uncorrected(query, kv_bytes(query.problem) / bytes_per_us);
}

// A wave here is of the longest tiles that there are.
TileWaves tile_waves(const Query& query, const TileWork& work, const Config& config) {
  const int64_t workers = std::max(1, config.workers);
  const int64_t keys = most_visible_keys(query.problem, work.order.tile_queries) + config.tile_k;
  const double read_share = std::min(
      1.0, static_cast<double>(workers) / static_cast<double>(std::max(1, work.order.tiles)));
  return {work.order.tiles, workers,
          std::max(tile_us(query, work, static_cast<double>(keys)), read_us(query) * read_share)};
}

}  // namespace

TileOrder tile_order(const Problem& p, int32_t tile_q, int32_t least_packed, int32_t blocks) {
  TileOrder order{};
  const int64_t group = std::max<int64_t>(1, p.group());
  // Of so many queries, for all sequences; of packed queries whichever way to count them is less.
  const auto each_ones_tiles = [&](int64_t queries) {
    return p.batch * divide_up(p.len_q, queries);
  };
  const auto slots = [&](int64_t queries) {
    return p.query_layout == QueryLayout::kPacked ? slot_count(p.total_q, queries, p.batch)
                                                  : each_ones_tiles(queries);
  };
  const auto tiles_with = [&](int64_t packed) {
    const int64_t queries = tile_q / packed;
    return std::min(slots(queries), each_ones_tiles(queries)) * (group / packed);
  };
  // Packing costs address arithmetic and fills the tiles of short queries; 5 % fewer pay for it.
  int64_t packed = least_packed;
  for (int64_t heads = packed + 1; heads <= std::min<int64_t>(group, tile_q); ++heads) {
    if (group % heads != 0) continue;
    if (tiles_with(heads) * 20 < tiles_with(packed) * 19) packed = heads;
  }
  order.packed_heads = static_cast<int32_t>(packed);
  order.tile_queries = static_cast<int32_t>(tile_q / packed * blocks);
  order.has_slots = slots(order.tile_queries) < each_ones_tiles(order.tile_queries);
  order.query_tiles = static_cast<int32_t>(
      order.has_slots ? slots(order.tile_queries) : divide_up(p.len_q, order.tile_queries));
  order.head_sets = static_cast<int32_t>((order.has_slots ? 1 : p.batch) * p.heads_q / packed);
  order.tiles = order.query_tiles * order.head_sets;
  // K and V of a section fit in two thirds of the 50 MB of L2.
  constexpr int64_t kSectionBytes = 32 << 20;
  const int64_t element_bytes = is_quantised(p) ? 1 : 2;
  const int64_t head_bytes = std::max<int64_t>(1, p.len_k * (p.dim_qk + p.dim_v) * element_bytes);
  const int64_t heads_kv = std::max<int64_t>(1, kSectionBytes / head_bytes);
  order.section_sets = static_cast<int32_t>(
      std::clamp<int64_t>(heads_kv * (group / packed), 1, std::max(1, order.head_sets)));
  return order;
}

bool claims_tiles(const Problem& p, int64_t tiles, int32_t workers) {
  return tiles > workers &&
         (p.causal != Causal::kNone || p.window_left != kUnlimited ||
          p.window_right != kUnlimited || p.has_key_lengths || p.has_key_starts || !p.is_dense());
}

std::optional<std::string> tile_refusal(const Query& query) {
  const Problem& p = query.problem;
  if (auto reason = sm90_refusal(query)) return reason;
  if (least_splits(p) > 1) return kWritesTypeOfQ;
  if (!p.is_dense() && scores_of(p) == Scores::kMasked) {
    return "takes array masks over dense keys alone";
  }
  constexpr int64_t kMostTiles = int64_t{1} << 30;
  const int64_t tiles = p.batch * p.heads_q * divide_up(p.len_q, 64);
  if (tiles <= kMostTiles) return std::nullopt;
  return fmt::format("counts tiles of 64 queries by int32: {} are more than {}", tiles, kMostTiles);
}

void deal_tiles(const Query& query, const TileWork& work, Config& config) {
  const int32_t workers = cuda_facts(query).sms / work.worker_sms;
  config.workers = std::max(1, std::min(workers, work.order.tiles));
  if (query.limits.longest_step_us > 0) {
    config.step_tiles =
        choose_step_tiles(query, tile_waves(query, work, config), tiles_us(query, work, config));
  }
}

size_t tiles_workspace_bytes(const Problem& p, const TileWork& work, const Config& config) {
  return claims_tiles(p, work.order.tiles, config.workers) ? sizeof(*work.order.next) : 0;
}

double tiles_us(const Query& query, const TileWork& work, const Config& config) {
  const Problem& p = query.problem;
  const int32_t workers = std::max(1, config.workers);
  // Keys of a query on average, and half a tile more where its last tile is cut.
  const double mean = mean_key_share(p), half_tile = static_cast<double>(config.tile_k) / 2;
  const double keys =
      visible_pairs(p) / static_cast<double>(std::max<int64_t>(1, p.len_q)) * mean + half_tile;
  constexpr double kFixedUs = 12;  // what small problems take in a graph, beyond their tiles
  const double rounds = static_cast<double>(work.order.tiles) / workers;
  if (mean < 1) {
    // No tile is cut by its keys, and none is claimed for being long: one of the longest sequence
    // begins anywhere. This share of its time the others wait for it: on average of 40 batches of
    // 64 log-uniform lengths (0.13 to 0.72), simulated with workers that read 50 GB/s each.
    constexpr double kLate = 0.4;
    const double longest_us =
        tile_us(query, work, static_cast<double>(most_visible_keys(p, work.order.tile_queries)));
    const double all_us = std::max(tile_us(query, work, keys) * rounds, read_us(query));
    return std::max(longest_us, all_us + (rounds > 1 ? kLate * longest_us : 0)) + kFixedUs;
  }
  // Tiles dealt in turn end together; claimed ones leave half a tile idle in the end.
  const double idle_rounds =
      claims_tiles(p, work.order.tiles, workers) ? rounds + 0.5 : std::ceil(rounds);
  // Reading delays who asks, the more the longer it takes to ask: those keys in pages of 16 took
  // 159 to 176 us, in pages of 64, of which there are a fourth, no more than dense ones.
  constexpr double kDelay = 0.25;
  const double read = read_us(query);
  const double asked = std::min(asked_us(query, work, keys) * idle_rounds, read);
  return std::max(tile_us(query, work, keys) * idle_rounds, read) +
         kDelay * asked * asked / std::max(1.0, read) + kFixedUs;
}

double tiles_step_us(const Query& query, const TileWork& work, const Config& config) {
  return step_us_of(tile_waves(query, work, config), config.step_tiles,
                    tiles_us(query, work, config));
}

}  // namespace wh::cuda
