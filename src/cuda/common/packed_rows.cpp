#include "cuda/common/packed_rows.h"

#include "plan/kernel.h"

namespace wh::cuda {

PackedShape::PackedShape(const Problem& p, const Config& config)
    : row_tiles((p.len_q * p.group() + config.tile_q - 1) / config.tile_q),
      items(p.batch * p.heads_kv * row_tiles),
      splits(config.splits),
      blocks(items * splits) {}

}  // namespace wh::cuda
