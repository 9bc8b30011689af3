// Planning of the kernels that work through tiles of query rows: instances, order, packing, time.
// A kernel says how it lays rows over tiles and at which rate it works (TileWork); what the planner
// asks of it follows from that in one place.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "cuda/common/attention_args.h"
#include "cuda/common/steps.h"
#include "cuda/common/tile_order.h"
#include "cuda/common/variants.h"
#include "cuda/sm90/refusal.h"
#include "plan/kernel.h"

namespace wh::cuda {

struct TileVariant {
  Instance instance;
  // By Layouts and Scores. Packed queries have no array mask, and the code for one over paged or
  // packed keys would be a sixth of all: null.
  std::array<std::array<const void* (*)(), 3>, 2> functions;
  bool reads_codes = false;

  const void* function(const Problem& p) const {
    return functions[static_cast<size_t>(layouts_of(p))][static_cast<size_t>(scores_of(p))]();
  }
};

// The layouts that the code for such a problem is compiled for. Transformed scores over dense codes
// are few, and the code for all layouts takes them.
constexpr Layouts compiled_layouts(bool reads_codes, Scores scores, Layouts layouts) {
  return reads_codes && scores == Scores::kTransformed ? Layouts::kAll : layouts;
}

// One for each instance of a table, or of one over elements and one over codes, with
// functions.operator()<kDims, kDtype, kScores, kLayouts, kReadsCodes>().
template <const auto&... kTables, typename Functions>
constexpr auto tile_variants(Functions functions) {
  return variants_of<kTables...>([&]<Instance kInstance, bool kReadsCodes = false>() {
    TileVariant variant{kInstance, {}, kReadsCodes};
    if constexpr (kInstance.is_compiled) {
      const auto function = [&]<Scores kScores, Layouts kLayouts>() {
        return functions
            .template operator()<kInstance.dims, kInstance.dtype, kScores,
                                 compiled_layouts(kReadsCodes, kScores, kLayouts), kReadsCodes>();
      };
      variant.functions = {
          {{function.template operator()<Scores::kPlain, Layouts::kDense>(),
            function.template operator()<Scores::kTransformed, Layouts::kDense>(),
            function.template operator()<Scores::kMasked, Layouts::kDense>()},
           {function.template operator()<Scores::kPlain, Layouts::kAll>(),
            function.template operator()<Scores::kTransformed, Layouts::kAll>(), nullptr}}};
    }
    return variant;
  });
}

// Why a kernel of this kind refuses whatever its dimensions.
std::optional<std::string> tile_refusal(const Query& query);

// How rows are laid over tiles of `tile_q` rows and in which order these run, without the counter.
// Packs at least `least_packed` heads of a group into a tile, more where that fills tiles better.
// A tile is that of one block, or of `blocks` that split its queries.
TileOrder tile_order(const Problem& problem, int32_t tile_q, int32_t least_packed,
                     int32_t blocks = 1);

// Whether so many tiles differ in length and are more than the workers, so that claiming them from
// a counter beats dealing them in turn.
bool claims_tiles(const Problem& problem, int64_t tiles, int32_t workers);

struct TileWork {
  TileOrder order;
  HeadDims dims;        // computed, padding included
  int32_t worker_rows;  // of a tile
  int32_t worker_sms;   // 1 where a worker is a block, 2 where it is a cluster of two
  int32_t box_keys;     // rows of a box of keys in pages
  double share;         // of the card's dense tensor rate that the main loop reaches
};

// The rest of a configuration that has its instance and its tiles.
void deal_tiles(const Query& query, const TileWork& work, Config& config);

size_t tiles_workspace_bytes(const Problem& problem, const TileWork& work, const Config& config);
double tiles_us(const Query& query, const TileWork& work, const Config& config);
double tiles_step_us(const Query& query, const TileWork& work, const Config& config);

// Those three as a Kernel has them.
using TileWorkOf = TileWork (*)(const Problem& problem, const Config& config);
template <TileWorkOf kWorkOf>
size_t workspace_bytes_by(const Problem& problem, const Config& config) {
  return tiles_workspace_bytes(problem, kWorkOf(problem, config), config);
}
template <TileWorkOf kWorkOf>
double estimate_us_by(const Query& query, const Config& config) {
  return tiles_us(query, kWorkOf(query.problem, config), config);
}
template <TileWorkOf kWorkOf>
double step_us_by(const Query& query, const Config& config) {
  return tiles_step_us(query, kWorkOf(query.problem, config), config);
}

}  // namespace wh::cuda
