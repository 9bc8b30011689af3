// Which share of which sequence's keys a block works on.
#pragma once

#include <cstdint>

#include "cuda/common/key_range.h"
#include "cuda/common/packed_rows.h"
#include "cuda/sm90/decode/kernel.h"

namespace wh::cuda::decode {

// A block's item, and how many blocks share its sequence's keys.
struct BlockItem {
  PackedItem item;
  int32_t splits;
};

// The place of a share among those of a kv head, which follow each other by sequences.
struct Share {
  int32_t batch_idx;  // negative: there are no more
  int32_t split, splits;
};

// Every warp finds it out by itself, in two looks at the lengths: at all of them for the length of
// a share, then at those in front of share `number`. A lane has every 32nd sequence.
template <int kTileK>
__device__ __forceinline__ Share find_share(const AttentionArgs& args, const ShareRule& rule,
                                            int32_t number) {
  const int lane = threadIdx.x % 32;
  const auto tiles_of = [&](int32_t batch_idx) {
    if (batch_idx >= args.batch) return 0;
    const Keys present = sequence_at<int32_t>(args, batch_idx).present;
    return (present.end + kTileK - 1) / kTileK - present.begin / kTileK;
  };
  int32_t sum = 0, most = 0;
  for (int32_t i = lane; i < args.batch; i += 32) {
    const int32_t tiles = tiles_of(i);
    sum += tiles;
    most = max(most, tiles);
  }
  __syncwarp();
  const int32_t share_tiles =
      rule.share_tiles(args.batch, __reduce_add_sync(~0u, sum), __reduce_max_sync(~0u, most));
  int32_t first = 0;
  for (int32_t base = 0; base < args.batch; base += 32) {
    const int32_t batch_idx = base + lane;
    const int32_t splits =
        batch_idx < args.batch ? rule.splits(share_tiles, tiles_of(batch_idx)) : 0;
    int32_t end = splits;  // of the lane's shares, from `first` on
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int32_t before = __shfl_up_sync(~0u, end, step);
      if (lane >= step) end += before;
    }
    const uint32_t past = __ballot_sync(~0u, first + end > number);
    if (past != 0) {
      const int owner = __ffs(past) - 1;
      const int32_t owned = __shfl_sync(~0u, splits, owner);
      const int32_t owner_end = first + __shfl_sync(~0u, end, owner);
      return {base + owner, number - (owner_end - owned), owned};
    }
    first += __shfl_sync(~0u, end, 31);
  }
  return {-1, 0, 1};
}

// Where shares follow the total of keys, blocks past the last share have none: equal lengths leave
// most of them, and they end before they have made an item.
template <typename Tile, Layouts kLayouts>
__device__ __forceinline__ Share block_share(const DecodeArgs& args) {
  if (kLayouts == Layouts::kDense || args.shares.wave_shares == 0) {
    return {0, 0, args.partials.splits};
  }
  const auto number = args.rows.heads_kv.quotient(static_cast<int32_t>(blockIdx.x));
  return find_share<Tile::kTileK>(args.attention, args.shares, number);
}

template <typename Tile, Layouts kLayouts>
__device__ __forceinline__ BlockItem block_item(const DecodeArgs& args, const Share& share) {
  // One place makes the item, whoever says which: two would keep all of it in registers.
  auto index = static_cast<int32_t>(blockIdx.x);
  const bool is_balanced = kLayouts == Layouts::kAll && args.shares.wave_shares > 0;
  if (is_balanced) {
    const Divisor& heads_kv = args.rows.heads_kv;
    const int32_t head_kv = heads_kv.remainder(index, heads_kv.quotient(index));
    const int32_t pair = share.batch_idx * static_cast<int32_t>(heads_kv) + head_kv;
    index = pair * args.partials.splits;
  }
  BlockItem block{{args.attention, args.rows, index, Tile::kTileQ, Tile::kTileK, kLayouts},
                  share.splits};
  if (is_balanced) {
    PackedItem& item = block.item;
    item.split = share.split;
    const int32_t count = max(0, item.tiles.end - item.tiles.begin);
    const int32_t tiles = count / share.splits;
    const int32_t left = count - tiles * share.splits;
    item.tile_begin = item.tiles.begin + tiles * share.split + min(share.split, left);
    item.tile_end = item.tile_begin + tiles + (share.split < left ? 1 : 0);
  }
  return block;
}

// Of the shares that the sequence does not have, weights of 0: a merge asks for the most of any.
template <int kThreads>
__device__ __forceinline__ void weigh_missing(const DecodeArgs& args, const BlockItem& block) {
  const PackedItem& item = block.item;
  const Partials& partials = args.partials;
  if (item.split > 0) return;
  for (int32_t row = threadIdx.x; row < item.rows; row += kThreads) {
    const PackedRow at(args.attention, args.rows, item, row);
    RowWeight* weights = partials.weights + at.index(args.attention, item) * partials.splits;
    for (int32_t i = block.splits; i < partials.splits; ++i) weights[i] = {-INFINITY, 0};
  }
}

}  // namespace wh::cuda::decode
