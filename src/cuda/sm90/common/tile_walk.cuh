// The walk over tiles of queries that both kernels for many queries share: which tile a worker
// takes next, what it works on there, and in which order it meets the tile's keys.
#pragma once

#include "cuda/common/attention_args.h"
#include "cuda/common/key_range.h"
#include "cuda/common/tile_order.h"

namespace wh::cuda {

struct WalkedTile {
  QueryTile at;
  Sequence sequence;
  KeyTiles keys;
};

__device__ __forceinline__ WalkedTile walked_tile(const AttentionArgs& args, const TileOrder& order,
                                                  int32_t index, int32_t tile_k) {
  // Opaque: computing it again after the main loop is cheaper than ten registers through it.
  asm volatile("" : "+r"(index));
  WalkedTile tile;
  tile.at = query_tile(order, args.heads_q, index);
  tile.sequence = dense_sequence(args, tile.at.batch_idx);
  const int32_t last = min(args.len_q, tile.at.first_query + order.tile_queries) - 1;
  tile.keys = key_tiles(args, tile.sequence, tile.at.first_query, last, tile_k);
  return tile;
}

// Of a worker that was at `index`.
__device__ __forceinline__ int32_t next_query_tile(const TileOrder& order, int32_t workers,
                                                   int32_t index) {
  if (order.next == nullptr) return index + workers;
  return claimed_tile(order, workers, atomicAdd(order.next, 1));
}

// Tiles of keys from `n` down to the first. hides(n) where some query may not see all of a tile,
// and always where there is an array mask (no tile is full); shows(n) elsewhere.
//
// From a full tile on, down to `full_begin`, all are full: one comparison a tile. Two bodies in two
// loops: one that tests for the mask in between would keep products from overlapping.
template <bool kIsMasked, typename Hides, typename Shows>
__device__ __forceinline__ void walk_keys(const KeyTiles& keys, int32_t n, Hides hides,
                                          Shows shows) {
  if constexpr (kIsMasked) {
#pragma unroll 1
    for (; n >= keys.begin; --n) hides(n);
  } else {
    const int32_t full_begin = max(keys.begin, keys.full_begin);
    while (n >= keys.begin) {
#pragma unroll 1
      for (; n >= keys.begin && !keys.is_full(n); --n) hides(n);
#pragma unroll 1
      for (; n >= full_begin; --n) shows(n);
    }
  }
}

}  // namespace wh::cuda
