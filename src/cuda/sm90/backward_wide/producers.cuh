// What fills the rings of sm90_backward_wide: a thread for each, and for blocks of keys a warp that
// fetches numbers of the queries.
#pragma once

#include "cuda/sm90/backward_wide/block.cuh"

namespace wh::cuda {

template <typename Block, typename RingOf>
struct WideFeeder {
  const Block& block;
  RingOf ring;
  uint32_t turn = 0;  // whose the next panel is

  __device__ __forceinline__ void load(const CUtensorMap& map, int first_panel, int panels,
                                       typename Block::Place place) {
    const SideRows past =
        block.item.rows_of(block.attention(), Block::kIsKeys ? Side::kQueries : Side::kKeys);
    const int32_t row = past.first + place.tile * Block::kColumns;
#pragma unroll 1
    for (int i = first_panel; i < first_panel + panels; ++i) {
      const uint32_t full = block.barrier(Block::kSlotFull + ring.slot);
      ptx::mbarrier_wait(block.barrier(Block::kSlotFree + ring.slot), ring.parity ^ 1);
      ptx::mbarrier_expect(full, kWideGradientSlotBytes);
      if (turn == block.rank) {
        ptx::tma_multicast_4d(block.s_slot(ring.slot), &map, full, i * kPanelColumns, row,
                              place.head, past.batch_idx, Block::kBothBlocks);
      }
      turn ^= 1;
      ring.next();
    }
  }
};

template <int kPanels, typename Block>
__device__ __forceinline__ void load_own_panels(const Block& block, const CUtensorMap& map,
                                                uint32_t to) {
  const SideRows own = block.item.rows_of(block.attention(), side_of(Block::kOf));
#pragma unroll 1
  for (int i = 0; i < kPanels; ++i) {
    ptx::tma_load_4d(to + i * panel_bytes(Block::kRows), &map, block.barrier(Block::kOwnFull),
                     i * kPanelColumns, own.first + block.item.first, block.item.head,
                     own.batch_idx);
  }
}
template <typename Block>
__device__ __forceinline__ void load_own(const Block& block) {
  ptx::mbarrier_expect(block.barrier(Block::kOwnFull), Block::kMemory.own_bytes);
  load_own_panels<Block::kPanelsQk>(block, block.maps.own_qk, block.s_own);
  if constexpr (!Block::kIsDv)
    load_own_panels<Block::kPanelsV>(block, block.maps.own_v, block.s_own_v());
}

// Scores of a tile, then what the weights of the one before are multiplied by.
template <typename Block>
__device__ __forceinline__ void feed_left(const Block& block) {
  load_own(block);
  WideFeeder<Block, typename Block::LeftRing> feeder{block, {}};
  const CUtensorMap& summed = Block::kIsDv ? block.maps.v : block.maps.qk;
  typename Block::Place place = block.first_place(), last = place;
  const int32_t tiles = block.walk_tiles();
#pragma unroll 1
  for (int32_t i = 0; i < tiles; ++i) {
    feeder.load(block.maps.qk, 0, Block::kPanelsQk, place);
    if (i > 0) feeder.load(summed, 0, Block::kLeftPanels, last);
    last = place;
    place = block.after(place);
  }
  if (tiles > 0) feeder.load(summed, 0, Block::kLeftPanels, last);
}
template <typename Block>
__device__ __forceinline__ void feed_right(const Block& block) {
  WideFeeder<Block, typename Block::RightRing> feeder{block, {}};
  const CUtensorMap& summed = Block::kIsDv ? block.maps.v : block.maps.qk;
  typename Block::Place place = block.first_place();
#pragma unroll 1
  for (int32_t left = block.walk_tiles(); left > 0; --left) {
    if constexpr (!Block::kIsDv) feeder.load(block.maps.v, 0, Block::kPanelsV, place);
    feeder.load(summed, Block::kLeftPanels, Block::kRightPanels, place);
    place = block.after(place);
  }
}

template <typename Block>
__device__ __forceinline__ void fetch_queries(const Block& block) {
  Ring<Block::kStages> ring;
  typename Block::Place place = block.first_place();
#pragma unroll 1
  for (int32_t left = block.walk_tiles(); left > 0; --left) {
    ptx::mbarrier_wait(block.barrier(Block::kQueriesFree + ring.slot), ring.parity ^ 1);
    block.queries(ring.slot).fetch(block.args, block.item, place.head, place.tile);
    ptx::mbarrier_arrive(block.barrier(Block::kQueriesFull + ring.slot));
    ring.next();
    place = block.after(place);
  }
}

}  // namespace wh::cuda
