// sm90_backward_wide: gradients on Hopper by TMA and wgmma, heads up to 512 wide, f16 and bf16.
//
//   p = 2^(s * log2(e) - shift)    ds = p * (d_out v^T - delta)
//   dv = p^T d_out    dq = scale * ds k    dk = scale * ds^T q
//
// Schedule. 64 rows of one gradient 512 wide fill the registers of two warpgroups, so a block sums
// one gradient of 64 rows of its own: three kernels, and no two blocks add to one number. Each
// consumer owns half of the columns. For dq and dk the left one makes the scores and weights, the
// right one d_out v^T and gradients of scores; weights go to the right in f32 and gradients come
// back rounded, through the same words of shared memory: a thread's are its namesake's, who writes
// only what it has read, and both are in the order of accumulators, which is that of operands. The
// left is a tile ahead: it makes scores while the right differentiates. For dv the left one makes
// weights for both, while the last tile's are multiplied.
//
// Two blocks of a cluster own neighbouring rows and meet the same rows of the other side, which
// come as panels of 64 rows and 64 columns, 8 KB: each block asks for every second one and
// multicasts it. Each consumer has a ring of its own and a thread that fills it, in the order in
// which it multiplies; what is summed comes a second time, as shared memory does not hold a tile
// beside the block's own rows.
//
// Roofline: tensor cores, 4096 flops a clock and SM; 2 * (5 * dim_qk + 3 * dim_v) flops a pair,
// eight products where five are the least: dk and dv of 64 keys together would be 1024 columns,
// which fill all registers of an SM. But 64 rows beside 64 take shared memory's port, 128 bytes a
// clock, longer than products: 4,480 clocks against 3,072 for dq and dk (first two products 2,048,
// copies 1,536, sums 512, exchange 384), 2,688 against 2,048 for dv: 1,800 of 4,096 flops a clock,
// counted as five products. L2 gives 21 bytes a clock and SM at that rate, 5 TB/s.
#pragma once

#include "cuda/common/element.cuh"
#include "cuda/common/scores.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/backward/weights.cuh"
#include "cuda/sm90/backward_wide/kernel.h"
#include "cuda/sm90/common/products.cuh"
#include "cuda/sm90/common/query_rows.cuh"
#include "cuda/sm90/common/ring.cuh"

namespace wh::cuda {

template <Gradient kOfGradient, int kDimQk, int kDimV, Dtype kDtype, Scores kScoresOf>
struct WideGradientBlock {
  using T = Element<kDtype>;
  static constexpr Gradient kOf = kOfGradient;
  static constexpr bool kIsKeys = side_of(kOf) == Side::kKeys;
  static constexpr bool kIsDv = kOf == Gradient::kDv;
  static constexpr Scores kScores = kScoresOf;
  static constexpr WideGradientMemory kMemory{{kDimQk, kDimV}, kOf};
  static constexpr int kRows = kWideGradientTile.rows, kColumns = kWideGradientTile.columns;
  static constexpr int kConsumerThreads = 128 * kGradientConsumers;
  static constexpr int kPanelsQk = kMemory.panels_qk, kPanelsV = kMemory.panels_v;
  static constexpr int kSumPanels = kIsDv ? kPanelsV : kPanelsQk;
  static constexpr int kLeftPanels = (kSumPanels + 1) / 2, kRightPanels = kSumPanels / 2;
  static constexpr int kSlots = kMemory.slots();
  static constexpr int kStages = kGradientStages;  // of the queries' numbers
  static constexpr uint16_t kBothBlocks = 3;
  static_assert(kScores != Scores::kMasked);
  static_assert(kMemory.bytes <= most_shared_bytes());
  static_assert(kDimQk % kPanelColumns == 0 && kDimV % kPanelColumns == 0);

  using Weights = GradientWeights<WideGradientBlock>;
  using LeftRing = Ring<kMemory.left_slots>;
  using RightRing = Ring<kMemory.right_slots, kMemory.left_slots>;

  // Barriers, 8 bytes each.
  enum Barrier {
    kOwnFull,
    kSlotFull,
    kSlotFree = kSlotFull + kSlots,  // in both blocks
    kQueriesFull = kSlotFree + kSlots,
    kQueriesFree = kQueriesFull + kStages,
    kBarriers = kQueriesFree + kStages,
  };
  static_assert(kMemory.barrier_offset + kBarriers * 8 <= kMemory.bytes);

  // Named barriers; 0 is __syncthreads().
  enum NamedBarrier {
    kWeightsFull = 1,
    kWeightsFree,    // of dv
    kGradientsFull,  // of dq and dk
    kLeftCleaned,
    kRightCleaned,
  };

  const GradientMaps& maps;
  const GradientBlockArgs& args;
  const BackwardItem& item;  // in shared memory
  unsigned char* s_memory;
  uint32_t s_own;  // the same in the shared window, where the block's own rows come first
  uint32_t rank;

  __device__ __forceinline__ const AttentionArgs& attention() const {
    return args.gradients.attention;
  }
  __device__ __forceinline__ uint32_t barrier(int which) const {
    return s_own + kMemory.barrier_offset + which * 8;
  }
  __device__ __forceinline__ uint32_t s_own_v() const {
    return s_own + kPanelsQk * panel_bytes(kRows);
  }
  __device__ __forceinline__ uint32_t s_slot(int slot) const {
    return s_own + kMemory.ring_offset + slot * kWideGradientSlotBytes;
  }
  __device__ __forceinline__ GradientQueries<kColumns> queries(int stage) const {
    return {s_memory + kMemory.queries_offset + stage * kColumns * GradientQuery::kBytes};
  }
  // What this thread and its namesake in the other warpgroup hand each other: 16 bytes every 128 of
  // them.
  template <typename Four>
  __device__ __forceinline__ Four* exchange() const {
    return reinterpret_cast<Four*>(s_memory + kMemory.exchange_offset) + threadIdx.x % 128;
  }
  template <typename Four, typename Number, int kCount>
  __device__ __forceinline__ void give(const Number (&from)[kCount]) const {
    Four* to = exchange<Four>();
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      to[i * 128] = {from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]};
    }
  }
  template <typename Four, typename Number, int kCount>
  __device__ __forceinline__ void take(Number (&to)[kCount]) const {
    const Four* from = exchange<Four>();
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      const Four four = from[i * 128];
      to[4 * i] = four.x;
      to[4 * i + 1] = four.y;
      to[4 * i + 2] = four.z;
      to[4 * i + 3] = four.w;
    }
  }

  __device__ __forceinline__ void init_barriers() const {
    ptx::mbarrier_init(barrier(kOwnFull), 1);
    for (int i = 0; i < kSlots; ++i) {
      ptx::mbarrier_init(barrier(kSlotFull + i), 1);
      ptx::mbarrier_init(barrier(kSlotFree + i), kWideGradientCluster * 4);
    }
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(barrier(kQueriesFull + i), 32);
      ptx::mbarrier_init(barrier(kQueriesFree + i), kIsDv ? 4 : 8);
    }
    ptx::mbarrier_init_fence();
  }

  // What streams past, in the order in which all of the cluster meet it.
  __device__ __forceinline__ int32_t walk_tiles() const {
    return (kIsKeys ? attention().group : 1) * max(0, item.end - item.begin);
  }
  struct Place {
    int32_t head, tile;
  };
  __device__ __forceinline__ Place first_place() const {
    const int32_t group = attention().group;
    return {kIsKeys ? item.head * group : item.head / group, item.begin};
  }
  __device__ __forceinline__ Place after(Place place) const {
    if (place.tile + 1 < item.end) return {place.head, place.tile + 1};
    return {place.head + 1, item.begin};
  }

  // --- producers: a thread for each ring ---

  template <typename RingOf>
  struct Feeder {
    const WideGradientBlock& block;
    RingOf ring;
    uint32_t turn = 0;  // whose the next panel is

    __device__ __forceinline__ void load(const CUtensorMap& map, int first_panel, int panels,
                                         Place place) {
#pragma unroll 1
      for (int i = first_panel; i < first_panel + panels; ++i) {
        const uint32_t full = block.barrier(kSlotFull + ring.slot);
        ptx::mbarrier_wait(block.barrier(kSlotFree + ring.slot), ring.parity ^ 1);
        ptx::mbarrier_expect(full, kWideGradientSlotBytes);
        if (turn == block.rank) {
          ptx::tma_multicast_4d(block.s_slot(ring.slot), &map, full, i * kPanelColumns,
                                place.tile * kColumns, place.head, block.item.batch_idx,
                                kBothBlocks);
        }
        turn ^= 1;
        ring.next();
      }
    }
  };

  __device__ __forceinline__ void load_own() const {
    ptx::mbarrier_expect(barrier(kOwnFull), kMemory.own_bytes);
    load_own_panels<kPanelsQk>(maps.own_qk, s_own);
    if constexpr (!kIsDv) load_own_panels<kPanelsV>(maps.own_v, s_own_v());
  }
  template <int kPanels>
  __device__ __forceinline__ void load_own_panels(const CUtensorMap& map, uint32_t to) const {
#pragma unroll 1
    for (int i = 0; i < kPanels; ++i) {
      ptx::tma_load_4d(to + i * panel_bytes(kRows), &map, barrier(kOwnFull), i * kPanelColumns,
                       item.first, item.head, item.batch_idx);
    }
  }

  // Scores of a tile, then what the weights of the one before are multiplied by.
  __device__ __forceinline__ void feed_left() const {
    load_own();
    Feeder<LeftRing> feeder{*this, {}};
    const CUtensorMap& summed = kIsDv ? maps.v : maps.qk;
    Place place = first_place(), last = place;
    const int32_t tiles = walk_tiles();
#pragma unroll 1
    for (int32_t i = 0; i < tiles; ++i) {
      feeder.load(maps.qk, 0, kPanelsQk, place);
      if (i > 0) feeder.load(summed, 0, kLeftPanels, last);
      last = place;
      place = after(place);
    }
    if (tiles > 0) feeder.load(summed, 0, kLeftPanels, last);
  }
  __device__ __forceinline__ void feed_right() const {
    Feeder<RightRing> feeder{*this, {}};
    const CUtensorMap& summed = kIsDv ? maps.v : maps.qk;
    Place place = first_place();
#pragma unroll 1
    for (int32_t left = walk_tiles(); left > 0; --left) {
      if constexpr (!kIsDv) feeder.load(maps.v, 0, kPanelsV, place);
      feeder.load(summed, kLeftPanels, kRightPanels, place);
      place = after(place);
    }
  }

  // --- a warp of a block of keys: numbers of the queries ---

  __device__ __forceinline__ void fetch_queries() const {
    Ring<kStages> ring;
    Place place = first_place();
#pragma unroll 1
    for (int32_t left = walk_tiles(); left > 0; --left) {
      ptx::mbarrier_wait(barrier(kQueriesFree + ring.slot), ring.parity ^ 1);
      queries(ring.slot).fetch(args, item, place.head, place.tile);
      ptx::mbarrier_arrive(barrier(kQueriesFull + ring.slot));
      ring.next();
      place = after(place);
    }
  }

  // --- consumers ---

  // What both do: products of panels that come through a ring, and sums of half of the columns.
  template <typename RingOf, int kPanels, int kCleaned>
  struct Consumer {
    const WideGradientBlock& block;
    Weights weights;
    RingOf ring;
    Ring<kStages> stages;  // of the queries' numbers
    int last_slot = 0;     // not yet released
    float sums[kPanels][kPanelColumns / 2];

    __device__ __forceinline__ explicit Consumer(const WideGradientBlock& block)
        : block(block), weights(block, 0) {
#pragma unroll
      for (auto& panel : sums) {
#pragma unroll
        for (float& sum : panel) sum = 0;
      }
    }

    __device__ __forceinline__ void wait_slot() const {
      ptx::mbarrier_wait(block.barrier(kSlotFull + ring.slot), ring.parity);
    }
    // To both blocks: either asks for the slot's next panel.
    __device__ __forceinline__ void release(int slot) const {
      const uint32_t lane = threadIdx.x % 32;
      if (lane < kWideGradientCluster) {
        ptx::mbarrier_arrive_at(block.barrier(kSlotFree + slot), lane);
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
      if (block.has_absent_keys(tile)) {
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
        if constexpr (kCleans) block.template clear_absent_keys<kCleaned>(ring.slot, tile);
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
      if constexpr (kIsKeys) {
        ptx::mbarrier_wait(block.barrier(kQueriesFull + stages.slot), stages.parity);
      }
    }
    __device__ __forceinline__ void release_queries() {
      if constexpr (kIsKeys) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(block.barrier(kQueriesFree + stages.slot));
        stages.next();
      }
    }

    __device__ __forceinline__ void store(int first_panel) const {
      const GradientArgs& g = block.args.gradients;
      const AttentionArgs& a = block.attention();
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        const int32_t column = (first_panel + i) * kPanelColumns;
        if constexpr (kOf == Gradient::kDq) {
          weights.store(sums[i], a.scale, g.dq, g.stride_dq, a.dim_qk, column);
        } else if constexpr (kOf == Gradient::kDk) {
          weights.store(sums[i], a.scale, g.dk, g.stride_dk, a.dim_qk, column);
        } else {
          weights.store(sums[i], 1 / Weights::kWeightScale, g.dv, g.stride_dv, a.dim_v, column);
        }
      }
    }
  };

  // Whether the tile has keys that are there in memory but absent: a NaN must not meet their
  // gradients of 0. What lies past the tensor TMA has made 0.
  __device__ __forceinline__ bool has_absent_keys(int32_t tile) const {
    if constexpr (kIsKeys) return false;
    const int32_t first = tile * kColumns;
    return first < item.present.begin ||
           min(first + kColumns, attention().len_k) > item.present.end;
  }
  template <int kCleaned>
  __device__ __forceinline__ void clear_absent_keys(int slot, int32_t tile) const {
    auto* chunks =
        reinterpret_cast<uint4*>(s_memory + kMemory.ring_offset + slot * kWideGradientSlotBytes);
#pragma unroll 1
    for (int i = threadIdx.x % 128; i < kWideGradientSlotBytes / 16; i += 128) {
      const int32_t key = tile * kColumns + i / 8;
      if (key < item.present.begin || key >= item.present.end) chunks[i] = make_uint4(0, 0, 0, 0);
    }
    ptx::async_proxy_fence();
    ptx::named_sync(kCleaned, 128);
  }

  using LeftBase = Consumer<LeftRing, kLeftPanels, kLeftCleaned>;
  using RightBase = Consumer<RightRing, kRightPanels, kRightCleaned>;

  // Scores and weights; the left half of the sums, a tile behind.
  struct Left : LeftBase {
    using LeftBase::block, LeftBase::weights, LeftBase::stages, LeftBase::ring, LeftBase::last_slot;
    uint32_t factors[kColumns / 4];  // of sums: weights, or gradients of scores

    using LeftBase::LeftBase;

    // For dv `factors` become the weights, else `s`.
    template <bool kHides>
    __device__ __forceinline__ void weigh(float (&s)[kColumns / 2], int32_t tile) {
      this->wait_queries();
      const GradientNumbers shifts = block.queries(stages.slot).shifts();
      if constexpr (kIsDv) {
        weights.template weigh<kHides>(s, factors, shifts, tile, stages.slot);
      } else {
        uint32_t none[1];
        weights.template weigh<kHides>(s, none, shifts, tile, stages.slot);
      }
      this->release_queries();
    }
    __device__ __forceinline__ void hand_over(const float (&s)[kColumns / 2]) const {
      if constexpr (kIsDv) {
        block.template give<uint4>(factors);
      } else {
        block.template give<float4>(s);
      }
      ptx::named_arrive(kWeightsFull, kConsumerThreads);
    }
    __device__ __forceinline__ void take_gradients() {
      ptx::named_sync(kGradientsFull, kConsumerThreads);
      block.template take<uint4>(factors);
    }

    template <bool kHides>
    __device__ __forceinline__ void first_tile(int32_t tile) {
      float s[kColumns / 2];
      this->template scores<kPanelsQk>(s, block.s_own);
      weigh<kHides>(s, tile);
      hand_over(s);
    }
    template <bool kHides>
    __device__ __forceinline__ void next_tile(int32_t tile, int32_t last) {
      float s[kColumns / 2];
      if constexpr (kIsDv) {
        next_weights<kHides>(s, tile);
        ptx::named_sync(kWeightsFree, kConsumerThreads);
        hand_over(s);
      } else {
        this->template scores<kPanelsQk>(s, block.s_own);
        weigh<kHides>(s, tile);
        take_gradients();
        hand_over(s);
        this->sum(factors, last);
      }
    }
    // Weights of a tile while those of the one before are multiplied.
    template <bool kHides>
    __device__ __forceinline__ void next_weights(float (&s)[kColumns / 2], int32_t tile) {
      uint32_t used[kColumns / 4];
#pragma unroll
      for (int i = 0; i < kColumns / 4; ++i) used[i] = factors[i];
      this->template begin_scores<kPanelsQk>(s, block.s_own);
      this->keep_sums();
      ptx::keep(used);
      int held[kLeftPanels];
#pragma unroll
      for (int i = 0; i < kLeftPanels; ++i) {
        this->wait_slot();
        this->issue_sum(i, used);
        held[i] = ring.slot;
        ring.next();
      }
      ptx::wgmma_wait<kLeftPanels>();
      ptx::keep(s);
      this->release(last_slot);
      weigh<kHides>(s, tile);
      ptx::wgmma_wait<0>();
      this->keep_sums();
      ptx::keep(used);
#pragma unroll
      for (int i = 0; i < kLeftPanels; ++i) this->release(held[i]);
    }

    __device__ __forceinline__ void run() {
      ptx::mbarrier_wait(block.barrier(kOwnFull), 0);
      int32_t left = block.walk_tiles();
      if (left > 0) {
        Place place = block.first_place();
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
        if constexpr (!kIsDv) take_gradients();
        this->sum(factors, place.tile);
      }
      this->store(0);
    }
  };

  // d_out v^T and gradients of scores, where those are needed; the right half of the sums.
  struct Right : RightBase {
    using RightBase::block, RightBase::weights, RightBase::stages;

    using RightBase::RightBase;

    template <bool kHides>
    __device__ __forceinline__ void work_on(int32_t tile) {
      float s[kColumns / 2], d[kColumns / 2];
      uint32_t gradients[kColumns / 4];
      this->template scores<kPanelsV>(d, block.s_own_v());
      this->wait_queries();
      ptx::named_sync(kWeightsFull, kConsumerThreads);
      block.template take<float4>(s);
      weights.template differentiate<kHides>(d, gradients, block.queries(stages.slot).deltas(),
                                             [&](int i) { return s[i]; });
      this->release_queries();
      block.template give<uint4>(gradients);
      ptx::named_arrive(kGradientsFull, kConsumerThreads);
      this->sum(gradients, tile);
    }

    __device__ __forceinline__ void run() {
      ptx::mbarrier_wait(block.barrier(kOwnFull), 0);
      Place place = block.first_place();
#pragma unroll 1
      for (int32_t left = block.walk_tiles(); left > 0; --left) {
        if constexpr (kIsDv) {
          uint32_t taken[kColumns / 4];
          ptx::named_sync(kWeightsFull, kConsumerThreads);
          block.template take<uint4>(taken);
          // Nobody waits behind the last tile.
          if (left > 1) ptx::named_arrive(kWeightsFree, kConsumerThreads);
          this->sum(taken, place.tile);
        } else if (block.item.is_full(place.tile)) {
          work_on<false>(place.tile);
        } else {
          work_on<true>(place.tile);
        }
        place = block.after(place);
      }
      this->store(kLeftPanels);
    }
  };
};

template <Gradient kOf, int kDimQk, int kDimV, Dtype kDtype, Scores kScores>
__global__ void __launch_bounds__(kGradientThreads, 1)
    sm90_backward_wide(const __grid_constant__ GradientMaps maps,
                       const __grid_constant__ GradientBlockArgs args) {
  using Block = WideGradientBlock<kOf, kDimQk, kDimV, kDtype, kScores>;
  extern __shared__ __align__(1024) unsigned char s_memory[];
  auto* item = reinterpret_cast<BackwardItem*>(s_memory + Block::kMemory.item_offset);
  const Block block{
      maps, args, *item, s_memory, ptx::shared_address(s_memory), ptx::cluster_rank()};
  if (threadIdx.x == 0) {
    // The cluster's: its blocks meet the same tiles, and a tile is full where it is for both.
    *item = BackwardItem(args.gradients, side_of(kOf), args.tiles,
                         args.first_item + static_cast<int32_t>(blockIdx.x) / kWideGradientCluster,
                         kWideGradientRows, Block::kColumns);
    item->first += static_cast<int32_t>(block.rank) * Block::kRows;
    block.init_barriers();
  }
  __syncthreads();
  ptx::cluster_sync();
  // Shuffled, so that the compiler knows it to be the same for the warp.
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    ptx::registers_give<kGradientProducerRegisters>();
    if (threadIdx.x == 0) {
      block.feed_left();
    } else if (threadIdx.x == 32) {
      block.feed_right();
    } else if (Block::kIsKeys && threadIdx.x >= 64 && threadIdx.x < 96) {
      block.fetch_queries();
    }
  } else {
    ptx::registers_take<kGradientConsumerRegisters>();
    if (warpgroup == 1) {
      typename Block::Left(block).run();
    } else {
      typename Block::Right(block).run();
    }
  }
  ptx::cluster_sync();  // no block leaves while the other may still write into it
}

template <Gradient kOf, int kDimQk, int kDimV, Dtype kDtype, Scores kScores>
const void* wide_gradient_instance() {
  return reinterpret_cast<const void*>(&sm90_backward_wide<kOf, kDimQk, kDimV, kDtype, kScores>);
}

}  // namespace wh::cuda
