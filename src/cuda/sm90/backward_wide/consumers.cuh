// What multiplies in sm90_backward_wide: two warpgroups, of which each sums half of the columns.
#pragma once

#include "cuda/sm90/backward_wide/block.cuh"
#include "cuda/sm90/common/products.cuh"

namespace wh::cuda {

// What both do: products of panels that come through a ring, and sums of half of the columns.
template <typename Block, typename RingOf, int kPanels, int kCleaned>
struct WideConsumer {
  using T = typename Block::T;
  using Weights = typename Block::Weights;
  static constexpr int kRows = Block::kRows, kColumns = Block::kColumns;

  const Block& block;
  Weights weights;
  RingOf ring;
  Ring<Block::kStages> stages;  // of the queries' numbers
  int last_slot = 0;            // not yet released
  float sums[kPanels][kPanelColumns / 2];

  __device__ __forceinline__ explicit WideConsumer(const Block& block)
      : block(block), weights(block, 0) {
#pragma unroll
    for (auto& panel : sums) {
#pragma unroll
      for (float& sum : panel) sum = 0;
    }
  }

  __device__ __forceinline__ void wait_slot() const {
    ptx::mbarrier_wait(block.barrier(Block::kSlotFull + ring.slot), ring.parity);
  }
  // To both blocks: either asks for the slot's next panel.
  __device__ __forceinline__ void release(int slot) const {
    const uint32_t lane = threadIdx.x % 32;
    if (lane < kWideGradientCluster) {
      ptx::mbarrier_arrive_at(block.barrier(Block::kSlotFree + slot), lane);
    }
  }
  __device__ __forceinline__ uint64_t slot_descriptor() const {
    return ptx::panel_descriptor(block.s_slot(ring.slot));
  }
  __device__ __forceinline__ void keep_sums() {
#pragma unroll
    for (int i = 0; i < kPanels; ++i) ptx::keep(sums[i]);
  }

  // Own rows times those that stream past; the last panel's products are still under way.
  template <int kOwnPanels>
  __device__ __forceinline__ void begin_scores(float (&s)[kColumns / 2], uint32_t s_own_rows) {
    const uint64_t own = ptx::panel_descriptor(s_own_rows);
    ptx::keep(s);
#pragma unroll
    for (int i = 0; i < kOwnPanels; ++i) {
      wait_slot();
      issue_scores<T, kColumns, kRows, kPanelSteps>(
          s, own + ptx::descriptor_offset(i * panel_bytes(kRows)), slot_descriptor(), i != 0);
      if (i > 0) {
        ptx::wgmma_wait<1>();
        release(last_slot);
      }
      last_slot = ring.slot;
      ring.next();
    }
  }
  template <int kOwnPanels>
  __device__ __forceinline__ void scores(float (&s)[kColumns / 2], uint32_t s_own_rows) {
    begin_scores<kOwnPanels>(s, s_own_rows);
    ptx::wgmma_wait<0>();
    ptx::keep(s);
    release(last_slot);
  }

  __device__ __forceinline__ void issue_sum(int panel, uint32_t (&factors)[kColumns / 4]) {
    issue_values<T, kPanelColumns, kColumns / kStepColumns>(sums[panel], factors,
                                                            slot_descriptor());
  }
  __device__ __forceinline__ void sum(uint32_t (&factors)[kColumns / 4], int32_t tile) {
    if (block.brings_others(tile)) {
      sum_panels<true>(factors, tile);
    } else {
      sum_panels<false>(factors, tile);
    }
  }
  template <bool kCleans>
  __device__ __forceinline__ void sum_panels(uint32_t (&factors)[kColumns / 4], int32_t tile) {
    keep_sums();
    ptx::keep(factors);
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      wait_slot();
      if constexpr (kCleans) block.clear_others(ring.slot, tile, kCleaned);
      issue_sum(i, factors);
      if (i > 0) {
        ptx::wgmma_wait<1>();
        release(last_slot);
      }
      last_slot = ring.slot;
      ring.next();
    }
    ptx::wgmma_wait<0>();
    keep_sums();
    ptx::keep(factors);
    release(last_slot);
  }

  __device__ __forceinline__ void wait_queries() const {
    if constexpr (Block::kIsKeys) {
      ptx::mbarrier_wait(block.barrier(Block::kQueriesFull + stages.slot), stages.parity);
    }
  }
  __device__ __forceinline__ void release_queries() {
    if constexpr (Block::kIsKeys) {
      __syncwarp();
      if (threadIdx.x % 32 == 0)
        ptx::mbarrier_arrive(block.barrier(Block::kQueriesFree + stages.slot));
      stages.next();
    }
  }

  __device__ __forceinline__ void store(int first_panel) const {
    const GradientArgs& g = block.args.gradients;
    const AttentionArgs& a = block.attention();
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      const int32_t column = (first_panel + i) * kPanelColumns;
      if constexpr (Block::kOf == Gradient::kDq) {
        weights.store(sums[i], a.scale, g.dq, g.stride_dq, a.dim_qk, column);
      } else if constexpr (Block::kOf == Gradient::kDk) {
        weights.store(sums[i], a.scale, g.dk, g.stride_dk, a.dim_qk, column);
      } else {
        weights.store(sums[i], 1 / Weights::kWeightScale, g.dv, g.stride_dv, a.dim_v, column);
      }
    }
  }
};

template <typename Block>
using WideLeftBase =
    WideConsumer<Block, typename Block::LeftRing, Block::kLeftPanels, Block::kLeftCleaned>;
template <typename Block>
using WideRightBase =
    WideConsumer<Block, typename Block::RightRing, Block::kRightPanels, Block::kRightCleaned>;

// Scores and weights; the left half of the sums, a tile behind.
template <typename Block>
struct WideLeft : WideLeftBase<Block> {
  using Base = WideLeftBase<Block>;
  using Base::block, Base::weights, Base::stages, Base::ring, Base::last_slot;
  using Base::kColumns;
  uint32_t factors[kColumns / 4];  // of sums: weights, or gradients of scores

  using Base::Base;

  // For dv `factors` become the weights, else `s`.
  template <bool kHides>
  __device__ __forceinline__ void weigh(float (&s)[kColumns / 2], int32_t tile) {
    this->wait_queries();
    const GradientNumbers shifts = block.queries(stages.slot).shifts();
    if constexpr (Block::kIsDv) {
      weights.template weigh<kHides>(s, factors, shifts, tile, stages.slot);
    } else {
      uint32_t none[1];
      weights.template weigh<kHides>(s, none, shifts, tile, stages.slot);
    }
    this->release_queries();
  }
  __device__ __forceinline__ void hand_over(const float (&s)[kColumns / 2]) const {
    if constexpr (Block::kIsDv) {
      block.template give<uint4>(factors);
    } else {
      block.template give<float4>(s);
    }
    ptx::named_arrive(Block::kWeightsFull, Block::kConsumerThreads);
  }
  __device__ __forceinline__ void take_gradients() {
    ptx::named_sync(Block::kGradientsFull, Block::kConsumerThreads);
    block.template take<uint4>(factors);
  }

  template <bool kHides>
  __device__ __forceinline__ void first_tile(int32_t tile) {
    float s[kColumns / 2];
    this->template scores<Block::kPanelsQk>(s, block.s_own);
    weigh<kHides>(s, tile);
    hand_over(s);
  }
  template <bool kHides>
  __device__ __forceinline__ void next_tile(int32_t tile, int32_t last) {
    float s[kColumns / 2];
    if constexpr (Block::kIsDv) {
      next_weights<kHides>(s, tile, last);
      ptx::named_sync(Block::kWeightsFree, Block::kConsumerThreads);
      hand_over(s);
    } else {
      this->template scores<Block::kPanelsQk>(s, block.s_own);
      weigh<kHides>(s, tile);
      take_gradients();
      hand_over(s);
      this->sum(factors, last);
    }
  }
  // Weights of a tile while those of the one before are multiplied.
  template <bool kHides>
  __device__ __forceinline__ void next_weights(float (&s)[kColumns / 2], int32_t tile,
                                               int32_t last) {
    uint32_t used[kColumns / 4];
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) used[i] = factors[i];
    this->template begin_scores<Block::kPanelsQk>(s, block.s_own);
    this->keep_sums();
    ptx::keep(used);
    int held[Block::kLeftPanels];
    const bool cleans = block.brings_others(last);
#pragma unroll
    for (int i = 0; i < Block::kLeftPanels; ++i) {
      this->wait_slot();
      if (cleans) block.clear_others(ring.slot, last, Block::kLeftCleaned);
      this->issue_sum(i, used);
      held[i] = ring.slot;
      ring.next();
    }
    ptx::wgmma_wait<Block::kLeftPanels>();
    ptx::keep(s);
    this->release(last_slot);
    weigh<kHides>(s, tile);
    ptx::wgmma_wait<0>();
    this->keep_sums();
    ptx::keep(used);
#pragma unroll
    for (int i = 0; i < Block::kLeftPanels; ++i) this->release(held[i]);
  }

  __device__ __forceinline__ void run() {
    ptx::mbarrier_wait(block.barrier(Block::kOwnFull), 0);
    int32_t left = block.walk_tiles();
    if (left > 0) {
      typename Block::Place place = block.first_place();
      if (block.item.is_full(place.tile)) {
        first_tile<false>(place.tile);
      } else {
        first_tile<true>(place.tile);
      }
#pragma unroll 1
      while (--left > 0) {
        const int32_t last = place.tile;
        place = block.after(place);
        if (block.item.is_full(place.tile)) {
          next_tile<false>(place.tile, last);
        } else {
          next_tile<true>(place.tile, last);
        }
      }
      if constexpr (!Block::kIsDv) take_gradients();
      this->sum(factors, place.tile);
    }
    this->store(0);
  }
};

// d_out v^T and gradients of scores, where those are needed; the right half of the sums.
template <typename Block>
struct WideRight : WideRightBase<Block> {
  using Base = WideRightBase<Block>;
  using Base::block, Base::weights, Base::stages;
  using Base::kColumns;

  using Base::Base;

  template <bool kHides>
  __device__ __forceinline__ void work_on(int32_t tile) {
    float s[kColumns / 2], d[kColumns / 2];
    uint32_t gradients[kColumns / 4];
    this->template scores<Block::kPanelsV>(d, block.s_own_v());
    this->wait_queries();
    ptx::named_sync(Block::kWeightsFull, Block::kConsumerThreads);
    block.template take<float4>(s);
    weights.template differentiate<kHides>(d, gradients, block.queries(stages.slot).deltas(),
                                           [&](int i) { return s[i]; });
    this->release_queries();
    block.template give<uint4>(gradients);
    ptx::named_arrive(Block::kGradientsFull, Block::kConsumerThreads);
    this->sum(gradients, tile);
  }

  __device__ __forceinline__ void run() {
    ptx::mbarrier_wait(block.barrier(Block::kOwnFull), 0);
    typename Block::Place place = block.first_place();
#pragma unroll 1
    for (int32_t left = block.walk_tiles(); left > 0; --left) {
      if constexpr (Block::kIsDv) {
        uint32_t taken[kColumns / 4];
        ptx::named_sync(Block::kWeightsFull, Block::kConsumerThreads);
        block.template take<uint4>(taken);
        // Nobody waits behind the last tile.
        if (left > 1) ptx::named_arrive(Block::kWeightsFree, Block::kConsumerThreads);
        this->sum(taken, place.tile);
      } else if (block.item.is_full(place.tile)) {
        work_on<false>(place.tile);
      } else {
        work_on<true>(place.tile);
      }
      place = block.after(place);
    }
    this->store(Block::kLeftPanels);
  }
};

}  // namespace wh::cuda
