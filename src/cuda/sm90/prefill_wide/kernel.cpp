#include "cuda/sm90/prefill_wide/kernel.h"

#include "cuda/sm90/prefill_wide/config.h"
#include "plan/kernel.h"

namespace wh::cuda {
Status run_prefill_wide(const Launch& launch) {
  const Problem& p = launch.problem;
  const TileVariant& variant = wide_variant(launch.config);
  const HeadDims dims = variant.instance.dims;
  const WideTile tile = wide_tile(dims, scores_of(p), layouts_of(p));
  const TileOrder order = wide_order(p);
  return run_tiles(launch, {.order = order,
                            .workers = launch.config.workers,
                            .block_queries = order.tile_queries / kWideCluster,
                            .box_keys = tile.tile_k * wide_panels_of_slot(tile) / kWideCluster,
                            .box_values = kWideValueRows,
                            .function = variant.function(p),
                            .threads = kWideThreads,
                            .shared_bytes = WideMemory(dims, tile).bytes,
                            .cluster = kWideCluster});
}

}  // namespace wh::cuda
