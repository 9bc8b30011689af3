#include "cuda/common/packed_rows.h"

#include "core/rounding.h"
#include "plan/kernel.h"

namespace wh::cuda {

PackedShape::PackedShape(const Problem& p, const Config& config)
    : has_slots(false),
      row_tiles(divide_up(p.len_q * p.group(), config.tile_q)),
      items(p.batch * p.heads_kv * row_tiles),
      splits(config.splits) {
  if (p.query_layout == QueryLayout::kPacked) {
    const int64_t slots = slot_count(p.total_q * p.group(), config.tile_q, p.batch);
    has_slots = slots < p.batch * row_tiles;
    if (has_slots) {
      row_tiles = slots;
      items = p.heads_kv * slots;
    }
  }
  blocks = items * splits;
}

}  // namespace wh::cuda
