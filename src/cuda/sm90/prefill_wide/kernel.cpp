#include "cuda/sm90/prefill_wide/kernel.h"

#include "cuda/sm90/prefill_wide/config.h"
#include "plan/kernel.h"

namespace wh::cuda {
Status run_prefill_wide(const Launch& launch) {
  const Problem& p = launch.problem;
  const TileVariant& variant = wide_variant(launch.config);
  const HeadDims dims = variant.instance.dims;
  const WideTile tile = wide_tile_of(p, variant);
  const TileOrder order = wide_order(p, tile);
  return run_tiles(launch, {.order = order,
                            .workers = launch.config.workers,
                            .block_queries = order.tile_queries / tile.cluster,
                            .box_keys = wide_box_keys(tile),
                            .box_values = kWideValueRows,
                            .function = variant.function(p),
                            .threads = tile.threads(),
                            .shared_bytes = WideMemory(dims, tile).bytes,
                            .cluster = tile.cluster});
}

}  // namespace wh::cuda
