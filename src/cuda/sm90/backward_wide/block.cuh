// What a block of sm90_backward_wide has and what its threads share; see kernel.cuh.
#pragma once

#include "cuda/common/element.cuh"
#include "cuda/common/scores.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/backward/absent_rows.cuh"
#include "cuda/sm90/backward/weights.cuh"
#include "cuda/sm90/backward_wide/kernel.h"
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

  __device__ __forceinline__ bool brings_others(int32_t tile) const {
    return item.brings_others(attention(), side_of(kOf), tile * kColumns, kColumns);
  }
  // Of a slot, by the consumer whose ring it is in.
  __device__ __forceinline__ void clear_others(int slot, int32_t tile, int cleaned) const {
    clear_absent_rows<kColumns, 128>(s_memory + kMemory.ring_offset + slot * kWideGradientSlotBytes,
                                     kWideGradientSlotBytes, tile * kColumns,
                                     item.met_rows(side_of(kOf)), cleaned);
  }
};

}  // namespace wh::cuda
