// The two warpgroups that compute in a block of sm90_prefill_wide: each sums one half of V's
// columns for the block's 64 rows, and the left one finds the weights for both.
#pragma once

#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/sm90/common/products.cuh"
#include "cuda/sm90/common/query_rows.cuh"
#include "cuda/sm90/common/tile_softmax.cuh"
#include "cuda/sm90/prefill_wide/block.cuh"
#include "cuda/sm90/prefill_wide/code_block.cuh"
#include "cuda/sm90/prefill_wide/code_slots.cuh"

namespace wh::cuda {

// What both do alike.
template <typename Block, typename RingOfHalf>
struct WideConsumer {
  using T = typename Block::T;
  using Work = typename Block::Work;
  static constexpr int kHalf = Block::kHalf, kTileK = Block::kTileK, kVRows = Block::kVRows;
  static constexpr int kVSlots = Block::kVSlots;
  static constexpr int kVSteps = kVRows / kStepColumns;  // of a slot
  static constexpr int kProduct = Block::kProductColumns;
  static constexpr bool kWidens = Block::kWidens;

  const Block& block;
  RingOfHalf ring;
  float r_o[kHalf / 2];  // [64 rows, kHalf], unnormalised

  __device__ __forceinline__ explicit WideConsumer(const Block& block) : block(block) {}

  __device__ __forceinline__ bool is_first_lane() const { return threadIdx.x % 32 == 0; }

  __device__ __forceinline__ int32_t next_tile_index(uint32_t number) {
    const int32_t index = block.read_tile(number);
    __syncwarp();
    if (is_first_lane()) block.release_tile(number);
    return index;
  }

  __device__ __forceinline__ void wait_slot() {
    ptx::mbarrier_wait(block.barrier(Block::kSlotFull + ring.slot), ring.parity);
  }
  __device__ __forceinline__ uint64_t value_descriptor() const {
    return ptx::panel_descriptor(block.s_slot(ring.slot), panel_bytes(kVRows));
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kHalf / 2; ++i) r_o[i] = 0;
  }

  __device__ __forceinline__ QueryRows<T, Work> query_rows(const Work& w) const {
    return {block.args, w, block.order.packed_heads, block.block_queries()};
  }

  __device__ __forceinline__ void restore(const Work& w, uint32_t number, int half,
                                          const float (&norm)[2]) {
    if (block.dropped(number, half) != number + 1) return;
    if constexpr (kWidens) {
      query_rows(w).restore(kTileK, 0, norm, half * kHalf, (half + 1) * kHalf,
                            widened_values(block.args, block.stored.v, w));
    } else {
      query_rows(w).restore(kTileK, 0, norm, half * kHalf, (half + 1) * kHalf);
    }
  }

  // Of this thread. Of codes opaque, as the tile is (walked_tile): two registers.
  __device__ __forceinline__ int32_t stored_row(int r) const {
    int32_t row = accumulator_row(r);
    if constexpr (kWidens) asm volatile("" : "+r"(row));
    return row;
  }
  // That half of the columns of the rows, whose norms these are.
  template <int kHalfIndex>
  __device__ __forceinline__ void store_half(const QueryRows<T, Work>& query_rows,
                                             const float (&norm)[2]) {
    float factor[2] = {norm[0], norm[1]};
    if constexpr (kWidens) {
      if (scales_sums(block.stored.v)) {
        scale_sums<kHalfIndex * kHalf>(r_o, norm, block.args, block.stored.v,
                                       head_of(block.args, query_rows.tile));
        for (float& f : factor) f = f == 0 ? 0 : 1;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      query_rows.store(r_o, r, query_rows.place(stored_row(r)), factor[r], kHalfIndex * kHalf);
    }
  }
};

// S = Q K^T, softmax, and the left half of O.
template <typename Block>
struct WideLeft : WideConsumer<Block, typename Block::LeftRing> {
  using Base = WideConsumer<Block, typename Block::LeftRing>;
  using Base::block, Base::r_o, Base::ring;
  using Base::kHalf, Base::kProduct, Base::kTileK, Base::kVSlots, Base::kVSteps, Base::kWidens;
  using typename Base::T;
  using typename Base::Work;
  static constexpr int kKSlots = Block::kKSlots;
  static constexpr int kSlotSteps = Block::kPanelsOfKSlot * kPanelSteps;
  static constexpr bool kIsMasked = Block::kScoresOf == Scores::kMasked;

  TileSoftmax<T> softmax;
  uint32_t r_p[kTileK / 4];  // [64 rows, kTileK], rounded to T
  int last_slot;             // of K, not yet released
  int v_slot;                // the first of the values under way
  ScaledTiles scaled;        // of codes

  __device__ __forceinline__ explicit WideLeft(const Block& block)
      : Base(block), softmax(block.args, Block::kScoresOf) {}

  __device__ __forceinline__ void begin_scores(float (&s)[kTileK / 2]) {
    ptx::keep(s);
    begin_slot<0>(s);
  }
  // Unrolled by recursion: the last slot may have fewer panels.
  template <int kSlot>
  __device__ __forceinline__ void begin_slot(float (&s)[kTileK / 2]) {
    if constexpr (kSlot < kKSlots) {
      constexpr int kFirst = kSlot * kSlotSteps, kAll = Block::kDims.dim_qk / kStepColumns;
      constexpr int kSteps = kAll - kFirst < kSlotSteps ? kAll - kFirst : kSlotSteps;
      this->wait_slot();
      const uint64_t q = ptx::panel_descriptor(block.s_q + kSlot * Block::kPanelsOfKSlot *
                                                               panel_bytes(kWideTileQ));
      const uint64_t k = ptx::panel_descriptor(block.s_slot(ring.slot));
      issue_scores<T, kTileK, kWideTileQ, kSteps>(s, q, k, kSlot > 0);
      if constexpr (kSlot > 0) {
        ptx::wgmma_wait<1>();
        block.release_slot(last_slot);
      }
      last_slot = ring.slot;
      ring.next();
      begin_slot<kSlot + 1>(s);
    }
  }

  __device__ __forceinline__ void begin_values() {
    ptx::keep(r_o);
    ptx::keep(r_p);
    v_slot = ring.slot;
#pragma unroll
    for (int slot = 0; slot < kVSlots; ++slot) {
      this->wait_slot();
      issue_values<T, kHalf, kVSteps, kProduct>(r_o, r_p + 4 * slot * kVSteps,
                                                this->value_descriptor());
      ring.next();
    }
  }

  __device__ __forceinline__ void finish_values() {
    ptx::wgmma_wait<0>();
    ptx::keep(r_o);
#pragma unroll
    for (int i = 0; i < kVSlots; ++i) {
      block.release_slot(v_slot);
      v_slot = ring.after(v_slot);
    }
  }

  // P and the corrections, for the right warpgroup.
  __device__ __forceinline__ void hand_over() {
    ptx::named_sync(Block::kWeightsFree, 256);
    const int lane = threadIdx.x % 32;
    const int row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < kTileK / kStepColumns; ++i) {
      ptx::stmatrix(block.s_weights() + chunk_offset(row, 2 * i + lane / 16, kWideTileQ),
                    r_p[4 * i], r_p[4 * i + 1], r_p[4 * i + 2], r_p[4 * i + 3]);
    }
    if (lane % 4 == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        block.s_factors()[accumulator_row(r)] = softmax.online.correction[r];
      }
    }
    ptx::async_proxy_fence();
    ptx::named_arrive(Block::kWeightsFull, 256);
  }

  __device__ __forceinline__ void first_tile(int32_t tile) {
    float s[kTileK / 2];
    begin_scores(s);
    ptx::wgmma_wait<0>();
    ptx::keep(s);
    block.release_slot(last_slot);
    scale_scores(s);
    softmax.raise(s, tile * kTileK, true);
    softmax.weigh(s);
    scale_weights(s);
    softmax.pack(s, r_p);
    hand_over();
  }

  // Scores of `tile` and the values of the tile before, which softmax hides.
  template <bool kHides>
  __device__ __forceinline__ void next_tile(int32_t tile) {
    float s[kTileK / 2];
    begin_scores(s);
    softmax.correct(r_o);
    begin_values();
    ptx::wgmma_wait<kVSlots>();
    ptx::keep(s);
    block.release_slot(last_slot);
    // The addresses of an array mask need the registers of the weights under way.
    if constexpr (kIsMasked) finish_values();
    scale_scores(s);
    softmax.raise(s, tile * kTileK, kHides);
    softmax.weigh(s);
    scale_weights(s);
    if constexpr (!kIsMasked) finish_values();
    softmax.pack(s, r_p);
    hand_over();
  }

  // Scores, and weights, of codes by the scales of the keys.
  __device__ __forceinline__ void scale_scores(float (&s)[kTileK / 2]) const {
    if constexpr (kWidens) {
      if (scaled.multiplies_scores()) multiply_by_scales(s, block.scales(scaled.count(), false));
    }
  }
  __device__ __forceinline__ void scale_weights(float (&s)[kTileK / 2]) {
    if constexpr (kWidens) {
      if (has_token_scales(block.stored.v)) {
        multiply_by_scales(s, block.scales(scaled.count(), true));
      }
      scaled.next();
    }
  }

  __device__ __forceinline__ void last_values() {
    softmax.correct(r_o);
    begin_values();
    finish_values();
  }

  __device__ __forceinline__ void store(const QueryRows<T, Work>& query_rows) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto place = query_rows.place(this->stored_row(r));
      query_rows.store_log_sum_exp(place, softmax.finish(r, query_rows.sink(place)));
    }
    ptx::named_sync(Block::kNormFree, 256);
    if (threadIdx.x % 4 == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        block.s_factors()[Block::kNorms + accumulator_row(r)] = softmax.norm(r);
      }
    }
    ptx::named_arrive(Block::kNormFull, 256);
    this->template store_half<0>(query_rows, softmax.online.correction);
  }

  // Notes which keys this thread's rows see; returns which tiles the cluster works on.
  __device__ __forceinline__ KeyTiles enter(const Work& w) {
    const QueryRows<T, Work> query_rows = this->query_rows(w);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      softmax.rows[r] = query_rows.scores(accumulator_row(r));
    }
    if constexpr (kWidens) {
      softmax.scale_log2 = scaled.template enter<Block::kScoresOf>(block.args, block.stored.k, w);
    }
    return w.keys;
  }

  __device__ __forceinline__ void run() {
    for (uint32_t number = 0;; ++number) {
      const int32_t index = this->next_tile_index(number);
      if (index < 0) return;
      const KeyTiles keys = enter(block.work(index));
      softmax.online = OnlineSoftmax{};
      this->clear();
      ptx::mbarrier_wait(block.barrier(Block::kQFull), number % 2);
      int32_t n = keys.end - 1;
      if (n >= keys.begin) {
        first_tile(n--);
        walk_keys<kIsMasked>(
            keys, n, [&](int32_t tile) { next_tile<true>(tile); },
            [&](int32_t tile) { next_tile<false>(tile); });
        block.release_queries();
        last_values();
      } else {
        block.release_queries();
      }
      const Work w = block.work(index);
      store(this->query_rows(w));
      this->restore(w, number, 0, softmax.online.correction);
    }
  }
};

// The right half of O, by the left one's weights.
template <typename Block>
struct WideRight : WideConsumer<Block, typename Block::RightRing> {
  using Base = WideConsumer<Block, typename Block::RightRing>;
  using Base::block, Base::r_o, Base::ring;
  using Base::kHalf, Base::kProduct, Base::kVSlots, Base::kVSteps;
  using typename Base::T;
  using typename Base::Work;

  using Base::Base;

  __device__ __forceinline__ void values() {
    ptx::named_sync(Block::kWeightsFull, 256);
    const float correction[2] = {block.s_factors()[accumulator_row(0)],
                                 block.s_factors()[accumulator_row(1)]};
    if (__any_sync(~0u, correction[0] != 1 || correction[1] != 1)) {
#pragma unroll
      for (int i = 0; i < kHalf / 2; ++i) r_o[i] *= correction[i / 2 % 2];
    }
    ptx::keep(r_o);
    int last_slot = 0;
    const uint64_t p = ptx::panel_descriptor(block.s_weights());
#pragma unroll
    for (int slot = 0; slot < kVSlots; ++slot) {
      this->wait_slot();
      issue_values<T, kHalf, kVSteps, kProduct>(r_o, p, slot * kVSteps, this->value_descriptor());
      if (slot > 0) {
        ptx::wgmma_wait<1>();
        block.release_slot(last_slot);
      }
      last_slot = ring.slot;
      ring.next();
    }
    ptx::wgmma_wait<0>();
    ptx::keep(r_o);
    block.release_slot(last_slot);
    ptx::named_arrive(Block::kWeightsFree, 256);
  }

  __device__ __forceinline__ void run() {
    ptx::named_arrive(Block::kWeightsFree, 256);
    ptx::named_arrive(Block::kNormFree, 256);
    for (uint32_t number = 0;; ++number) {
      const int32_t index = this->next_tile_index(number);
      if (index < 0) return;
      const Work w = block.work(index);
      this->clear();
#pragma unroll 1
      for (int32_t n = w.keys.end; n > w.keys.begin; --n) values();
      ptx::named_sync(Block::kNormFull, 256);
      const float norm[2] = {block.s_factors()[Block::kNorms + accumulator_row(0)],
                             block.s_factors()[Block::kNorms + accumulator_row(1)]};
      ptx::named_arrive(Block::kNormFree, 256);
      this->template store_half<1>(this->query_rows(w), norm);
      this->restore(w, number, 1, norm);
    }
  }
};

}  // namespace wh::cuda
