#include "cuda/sm90/prefill/kernel.h"

#include <array>
#include <iterator>
#include <utility>

#include "cuda/sm90/prefill/config.h"
#include "cuda/sm90/query_tiles.h"
#include "plan/kernel.h"

namespace wh::cuda {
namespace {

template <size_t... kIndex>
constexpr auto instances(std::index_sequence<kIndex...>) {
  using Get = const void* (*)();
  return std::array<Get, sizeof...(kIndex)>{
      &prefill_instance<kPrefillDims[kIndex / kVariants].dim_qk,
                        kPrefillDims[kIndex / kVariants].dim_v, variant_dtype(kIndex),
                        variant_scores(kIndex)>...};
}
constexpr auto kInstances =
    instances(std::make_index_sequence<std::size(kPrefillDims) * kVariants>());

}  // namespace

Status run_prefill(const Launch& launch) {
  const Problem& p = launch.problem;
  const int dims_index = prefill_dims_index(p);
  const HeadDims dims = kPrefillDims[dims_index];
  const PrefillTile tile = prefill_tile(dims, scores_of(p));
  const TileOrder order = tile_order(p, tile.tile_q(), 1);
  return run_tiles(launch, {.order = order,
                            .workers = launch.config.workers,
                            .block_queries = order.tile_queries,
                            .box_keys = tile.tile_k,
                            .box_values = tile.tile_k,
                            .function = kInstances[variant(dims_index, p)](),
                            .threads = tile.threads(),
                            .shared_bytes = PrefillMemory(dims, tile).bytes});
}

}  // namespace wh::cuda
