// In which order tiles of queries are worked on, and which queries a tile holds.
//
// Heads are taken in sections whose K and V fit L2 together; inside a section every head's last
// (with a causal mask: longest) tile comes first. Claiming tiles from a counter in this order took
// causal dim 256 from 616 to 705 TFLOP/s.
#pragma once

#include <cstdint>

#include "cuda/common/tile_slots.h"

namespace wh::cuda {

// Rows of a tile are queries x heads of one group: row r is query r / packed_heads of the tile and
// head r % packed_heads. One packed head where queries alone fill the tile.
struct TileOrder {
  int32_t packed_heads;
  int32_t tile_queries;  // queries a tile holds
  int32_t query_tiles;   // tiles of one set of packed heads
  int32_t head_sets;     // batch * heads_q / packed_heads; of slots heads_q / packed_heads
  int32_t section_sets;  // head sets whose K and V share L2
  int32_t tiles;         // query_tiles * head_sets
  int32_t begin, end;    // of the tiles that this launch takes
  int32_t* next;         // claims beyond the first tile of each worker; null: dealt in turn
  bool has_slots;        // query tiles are slots of all sequences (tile_slots.h)
};

struct QueryTile {
  int32_t batch_idx;
  int32_t first_head;  // of the packed ones
  int32_t first_query;
};

// A worker (a block, or a cluster) begins with its own tile of the launch, and goes on with the one
// that is a round further, or with the next that nobody has claimed: `claim` counts them from 0.
constexpr int32_t first_tile(const TileOrder& order, int32_t worker) {
  return order.begin + worker;
}
constexpr int32_t claimed_tile(const TileOrder& order, int32_t workers, int32_t claim) {
  return order.begin + workers + claim;
}

// With the number of the tile, in order of the queries, in place of its first one.
constexpr QueryTile numbered_tile(const TileOrder& order, int32_t heads_q, int32_t index) {
  const int32_t section_tiles = order.section_sets * order.query_tiles;
  const int32_t section = index / section_tiles;
  const int32_t within = index - section * section_tiles;
  const int32_t left = order.head_sets - section * order.section_sets;
  const int32_t width = left < order.section_sets ? left : order.section_sets;
  const int32_t row = within / width;
  const int32_t set = section * order.section_sets + within - row * width;
  const int32_t sets_a_batch = heads_q / order.packed_heads;
  const int32_t batch_idx = set / sets_a_batch;
  return {batch_idx, (set - batch_idx * sets_a_batch) * order.packed_heads,
          order.query_tiles - 1 - row};
}

constexpr QueryTile query_tile(const TileOrder& order, int32_t heads_q, int32_t index) {
  QueryTile tile = numbered_tile(order, heads_q, index);
  tile.first_query *= order.tile_queries;
  return tile;
}

// The same of sequences with lengths of their own, whose tiles may have no queries.
constexpr QueryTile query_tile(const TileOrder& order, const AttentionArgs& args, int32_t index) {
  if (!order.has_slots) return query_tile(order, args.heads_q, index);
  const QueryTile tile = numbered_tile(order, args.heads_q, index);
  const SlotTile at = slot_tile(args, {1, order.tile_queries}, tile.first_query);
  return {at.batch_idx, tile.first_head, at.tile * order.tile_queries};
}

}  // namespace wh::cuda
