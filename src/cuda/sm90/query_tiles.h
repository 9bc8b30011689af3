// Planning of the kernels that work through tiles of query rows: order, packing, time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "cuda/common/steps.h"
#include "cuda/common/tile_order.h"
#include "cuda/sm90/prefill/tiles.h"
#include "plan/kernel.h"

namespace wh::cuda {

// "wgmma bf16": Kernel::variant of both of them.
std::string wgmma_variant(const Query& query, const Config& config);

// How rows are laid over tiles of `tile_q` rows and in which order these run, without the counter.
// Packs at least `least_packed` heads of a group into a tile, more where that fills tiles better.
TileOrder tile_order(const Problem& problem, int32_t tile_q, int32_t least_packed);

// Whether so many tiles differ in length and are more than the workers, so that claiming them from
// a counter beats dealing them in turn.
bool claims_tiles(const Problem& problem, int64_t tiles, int32_t workers);
constexpr size_t kTileCounterBytes = sizeof(int32_t);

// Too many tiles to count by int32.
std::optional<std::string> tile_count_refusal(const Problem& problem);

struct TileCost {
  HeadDims dims;   // computed, padding included
  int32_t tile_q;  // rows of a worker's tile
  int32_t tile_k;
  int32_t workers;     // blocks or clusters
  int32_t worker_sms;  // a block's one, a cluster's two
  double share;        // of the card's dense tensor rate that the main loop reaches
};
double estimate_tiles_us(const Query& query, const TileOrder& order, const TileCost& cost);
// A wave here is of the longest tiles that there are.
TileWaves tile_waves(const Query& query, const TileOrder& order, const TileCost& cost);

}  // namespace wh::cuda
