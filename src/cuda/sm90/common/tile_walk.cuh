// The walk over tiles of queries that both kernels for many queries share: which tile a worker
// takes next, what it works on there, and in which order it meets the tile's keys.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/attention_args.h"
#include "cuda/common/key_range.h"
#include "cuda/common/packed_rows.h"
#include "cuda/common/tile_order.h"

namespace wh::cuda {

template <Layouts kLayouts>
struct WalkedTile {
  static constexpr bool kIsDense = kLayouts == Layouts::kDense;

  QueryTile at;
  Sequence sequence;
  KeyTiles keys;

  // Packed queries leave some without any.
  __device__ __forceinline__ bool has_queries() const { return at.first_query < sequence.len_q; }
  __device__ __forceinline__ static QueryLayout query_layout(const AttentionArgs& args) {
    return kIsDense ? QueryLayout::kDense : args.query_layout();
  }
  __device__ __forceinline__ KeyRows key_rows(const AttentionArgs& args) const {
    const int32_t* pages = kIsDense ? nullptr : args.page_table.of(sequence.batch_idx);
    return wh::key_rows(pages, args.page_size, sequence);
  }
};

template <Layouts kLayouts>
__device__ __forceinline__ WalkedTile<kLayouts> walked_tile(const AttentionArgs& args,
                                                            const TileOrder& order, int32_t index,
                                                            int32_t tile_k) {
  // Opaque: computing it again after the main loop is cheaper than ten registers through it.
  asm volatile("" : "+r"(index));
  WalkedTile<kLayouts> tile;
  if constexpr (kLayouts == Layouts::kDense) {
    tile.at = query_tile(order, args.heads_q, index);
    tile.sequence = dense_sequence(args, tile.at.batch_idx);
  } else {
    tile.at = query_tile(order, args, index);
    tile.sequence = sequence_at<int32_t>(args, tile.at.batch_idx);
  }
  const int32_t last = min(tile.sequence.len_q, tile.at.first_query + order.tile_queries) - 1;
  tile.keys = key_tiles(args, tile.sequence, tile.at.first_query, last, tile_k);
  return tile;
}

// What a producer keeps of where it is: in registers where tensors are dense. Page tables need
// those: it then reads in shared memory what its first thread has written there.
struct ProducerNotes {
  int32_t tile;
  uint32_t q_parity;
  int32_t begin, full_begin, clean_end;  // as in KeyTiles
};
template <Layouts kLayouts>
using KeptNotes =
    std::conditional_t<kLayouts == Layouts::kDense, ProducerNotes, volatile ProducerNotes&>;

template <Layouts kLayouts, typename Mailbox>
__device__ __forceinline__ KeptNotes<kLayouts> kept_notes(volatile Mailbox& mailbox) {
  if constexpr (kLayouts == Layouts::kDense) {
    return {};
  } else {
    return mailbox.notes;
  }
}

template <typename Notes>
__device__ __forceinline__ void note_keys(Notes& notes, const KeyTiles& keys) {
  notes.begin = keys.begin;
  notes.full_begin = keys.full_begin;
  notes.clean_end = keys.clean_end;
}
// KeyTiles::is_clean().
template <typename Notes>
__device__ __forceinline__ bool is_clean(const Notes& notes, int32_t tile) {
  return tile >= notes.full_begin && tile < notes.clean_end;
}

// Of a worker that was at `index`.
__device__ __forceinline__ int32_t next_query_tile(const TileOrder& order, int32_t workers,
                                                   int32_t index) {
  if (order.next == nullptr) return index + workers;
  return claimed_tile(order, workers, atomicAdd(order.next, 1));
}

// From this one on, the worker's next that has anything to do.
template <Layouts kLayouts>
__device__ __forceinline__ int32_t filled_tile(const AttentionArgs& args, const TileOrder& order,
                                               int32_t workers, int32_t index, int32_t tile_k) {
  if constexpr (kLayouts == Layouts::kAll) {
    if (args.query_offsets == nullptr) return index;
    while (index < order.end && !walked_tile<kLayouts>(args, order, index, tile_k).has_queries()) {
      index = next_query_tile(order, workers, index);
    }
  }
  return index;
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
