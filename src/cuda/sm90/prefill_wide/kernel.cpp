#include "cuda/sm90/prefill_wide/kernel.h"

#include <array>
#include <iterator>
#include <utility>

#include "cuda/sm90/prefill_wide/config.h"
#include "plan/kernel.h"

namespace wh::cuda {
namespace {

template <size_t... kIndex>
constexpr auto instances(std::index_sequence<kIndex...>) {
  using Get = const void* (*)();
  return std::array<Get, sizeof...(kIndex)>{
      &wide_instance<kWideDims[kIndex / kVariants].dim_qk, kWideDims[kIndex / kVariants].dim_v,
                     variant_dtype(kIndex), variant_scores(kIndex)>...};
}
constexpr auto kInstances = instances(std::make_index_sequence<std::size(kWideDims) * kVariants>());

}  // namespace

Status run_prefill_wide(const Launch& launch) {
  const Problem& p = launch.problem;
  const int dims_index = wide_dims_index(p);
  const HeadDims dims = kWideDims[dims_index];
  const WideTile tile = wide_tile(dims, scores_of(p));
  const TileOrder order = wide_order(p);
  return run_tiles(launch, {.order = order,
                            .workers = launch.config.workers,
                            .block_queries = order.tile_queries / kWideCluster,
                            .box_keys = tile.tile_k * wide_panels_of_slot(tile) / kWideCluster,
                            .box_values = kWideValueRows,
                            .function = kInstances[variant(dims_index, p)](),
                            .threads = kWideThreads,
                            .shared_bytes = WideMemory(dims, tile).bytes,
                            .cluster = kWideCluster});
}

}  // namespace wh::cuda
