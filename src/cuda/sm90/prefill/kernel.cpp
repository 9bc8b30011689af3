#include "cuda/sm90/prefill/kernel.h"

#include "cuda/sm90/prefill/config.h"
#include "cuda/sm90/query_tiles.h"
#include "plan/kernel.h"

namespace wh::cuda {
Status run_prefill(const Launch& launch) {
  const Problem& p = launch.problem;
  const TileVariant& variant = prefill_variant(launch.config);
  const HeadDims dims = variant.instance.dims;
  const PrefillTile tile = prefill_tile_of(p, variant);
  const TileOrder order = tile_order(p, tile.tile_q(), 1);
  return run_tiles(launch, {.order = order,
                            .workers = launch.config.workers,
                            .block_queries = order.tile_queries,
                            .box_keys = tile.tile_k,
                            .box_values = tile.tile_k,
                            .function = variant.function(p),
                            .threads = tile.threads(),
                            .shared_bytes = PrefillMemory(dims, tile).bytes});
}

}  // namespace wh::cuda
