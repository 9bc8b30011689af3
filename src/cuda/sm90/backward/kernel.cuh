// sm90_backward: gradients on Hopper by TMA and wgmma, heads up to 256 wide, f16 and bf16.
//
//   p = 2^(s * log2(e) - shift)    ds = p * (d_out v^T - delta)
//   dv = p^T d_out    dq = scale * ds k    dk = scale * ds^T q
//
// Schedule. Two kernels, so that no two blocks add to one number and bits are the same on every
// run: a block of the first owns 128 queries and sums dq while k and v stream past, a block of the
// second owns keys and sums dk and dv while q and d_out of every head of the group do. One thread
// of the producer warpgroup loads the block's own rows and then tiles of the other side by TMA, two
// stages of each tensor; in a block of keys its second warp brings what tells queries apart. Each
// consumer warpgroup owns 64 rows: scores and d_out v^T have them on the accumulators' rows, so
// that weights and gradients of scores become the first operand of the next product in registers.
// The weights are computed while d_out v^T is, ds while p^T d_out is; for the rest one consumer's
// arithmetic falls into the other's products.
//
// Where dk and dv of 64 keys are wider than a consumer's registers, both consumers share 64 keys in
// two roles: one makes the scores and dv, the other d_out v^T and dk, two products each. Weights go
// from the first to the second through shared memory in f32, 64 times the columns, in the order of
// the accumulators: an eighth of the products' traffic at dim 256.
//
// Roofline: tensor cores, 4096 flops a clock and SM; 2 * (4 * dim_qk + 3 * dim_v) flops a pair,
// seven products where five are the least: dq by the blocks of keys would be additions to memory,
// in turns to be the same on every run. A tile is read from L2 once a block: 192 flops a byte for
// 128 queries, 256 for 128 keys, 128 for 64 keys (4.7 TB/s at 600 TFLOP/s). Exponentials are a
// quarter of forward's share.
#pragma once

#include <type_traits>

#include "cuda/common/element.cuh"
#include "cuda/common/scores.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/backward/absent_rows.cuh"
#include "cuda/sm90/backward/kernel.h"
#include "cuda/sm90/backward/weights.cuh"
#include "cuda/sm90/common/products.cuh"
#include "cuda/sm90/common/query_rows.cuh"
#include "cuda/sm90/common/ring.cuh"

namespace wh::cuda {

template <Side kSideOf, int kDimQkOf, int kDimVOf, Dtype kDtype, Scores kScoresOf>
struct GradientBlock {
  using T = Element<kDtype>;
  static constexpr Side kSide = kSideOf;
  static constexpr bool kIsKeys = kSide == Side::kKeys;
  static constexpr int kDimQk = kDimQkOf, kDimV = kDimVOf;
  static constexpr Scores kScores = kScoresOf;
  static constexpr HeadDims kDims{kDimQk, kDimV};
  static constexpr GradientTile kTile = gradient_tile(kDims, kSide);
  static constexpr GradientMemory kMemory{kDims, kSide};
  static constexpr int kRows = kTile.rows;
  static constexpr int kColumns = kTile.columns;
  static constexpr int kStages = kGradientStages;
  static constexpr int kConsumerThreads = 128 * kGradientConsumers;
  static_assert(kScores != Scores::kMasked);
  static_assert(kMemory.bytes <= most_shared_bytes());
  static_assert(kColumns % kStepColumns == 0 && kDimQk % kStepColumns == 0 &&
                kDimV % kStepColumns == 0);
  // Panels begin at the 1024 bytes after which the swizzle repeats.
  static_assert(panel_bytes(kColumns) % 1024 == 0 && panel_bytes(kRows) % 1024 == 0);
  static_assert(kMemory.exchange_offset % 1024 == 0 && kMemory.queries_offset % 16 == 0);
  static_assert(kRows == (kTile.has_roles ? 64 : 64 * kGradientConsumers));

  // Barriers, 8 bytes each.
  enum Barrier {
    kOwnFull,
    kQkFull,  // in a block of keys with the queries' numbers
    kQkFree = kQkFull + kStages,
    kVFull = kQkFree + kStages,
    kVFree = kVFull + kStages,
    kBarriers = kVFree + kStages,
  };
  static_assert(kMemory.barrier_offset + kBarriers * 8 <= kMemory.bytes);

  // Named barriers; 0 is __syncthreads().
  static constexpr int kCleaned = 1;
  static constexpr int kWeightsFull = 2, kWeightsFree = 3;

  const GradientMaps& maps;
  const GradientBlockArgs& args;
  const BackwardItem& item;  // in shared memory
  unsigned char* s_memory;
  uint32_t s_own_qk;  // the same in the shared window, where the block's own rows come first

  __device__ __forceinline__ const AttentionArgs& attention() const {
    return args.gradients.attention;
  }
  __device__ __forceinline__ uint32_t barrier(int which) const {
    return s_own_qk + kMemory.barrier_offset + which * 8;
  }
  __device__ __forceinline__ uint32_t s_own_v() const { return s_own_qk + kMemory.own_v_offset; }
  __device__ __forceinline__ uint32_t s_qk(int stage) const {
    return s_own_qk + kMemory.qk_offset + stage * kMemory.qk_bytes;
  }
  __device__ __forceinline__ uint32_t s_v(int stage) const {
    return s_own_qk + kMemory.v_offset + stage * kMemory.v_bytes;
  }

  __device__ __forceinline__ GradientQueries<kColumns> queries(int stage) const {
    return {s_memory + kMemory.queries_offset + stage * kColumns * GradientQuery::kBytes};
  }

  __device__ __forceinline__ void init_barriers() const {
    ptx::mbarrier_init(barrier(kOwnFull), 1);
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(barrier(kQkFull + i), kIsKeys ? 1 + 32 : 1);
      ptx::mbarrier_init(barrier(kVFull + i), 1);
      ptx::mbarrier_init(barrier(kQkFree + i), 4 * kGradientConsumers);
      ptx::mbarrier_init(barrier(kVFree + i), 4 * kGradientConsumers);
    }
    ptx::mbarrier_init_fence();
  }

  // What streams past, in the order in which all of the block meet it: use(head, tile). Out of
  // shared memory once: a barrier would have it read again.
  template <typename Use>
  __device__ __forceinline__ void walk(Use use) const {
    const int32_t group = attention().group;
    const int32_t first_head = kIsKeys ? item.head * group : item.head / group;
    const int32_t end_head = kIsKeys ? first_head + group : first_head + 1;
    const int32_t begin = item.begin, end = item.end;
#pragma unroll 1
    for (int32_t head = first_head; head < end_head; ++head) {
#pragma unroll 1
      for (int32_t tile = begin; tile < end; ++tile) use(head, tile);
    }
  }
  // Tile by tile, which a consumer takes by work_on<kHides>().
  template <typename Consumer>
  __device__ __forceinline__ void walk_with(Consumer& consumer) const {
    const int32_t full_begin = item.full_begin, full_end = item.full_end;
    walk([&](int32_t, int32_t tile) {
      if (tile >= full_begin && tile < full_end) {
        consumer.template work_on<false>(tile);
      } else {
        consumer.template work_on<true>(tile);
      }
    });
  }
  __device__ __forceinline__ int32_t walk_tiles() const {
    return (kIsKeys ? attention().group : 1) * max(0, item.end - item.begin);
  }

  // --- producer: one thread ---

  __device__ __forceinline__ void produce() const {
    ptx::mbarrier_expect(barrier(kOwnFull), kMemory.own_qk_bytes + kMemory.own_v_bytes);
    const SideRows own = item.rows_of(attention(), kSide);
    load<kMemory.panels_qk, kRows>(maps.own_qk, s_own_qk, kOwnFull, own, item.first, item.head);
    load<kMemory.panels_v, kRows>(maps.own_v, s_own_v(), kOwnFull, own, item.first, item.head);
    const SideRows past = item.rows_of(attention(), kIsKeys ? Side::kQueries : Side::kKeys);
    Ring<kStages> ring;
    walk([&](int32_t head, int32_t tile) {
      const int32_t row = tile * kColumns;
      ptx::mbarrier_wait(barrier(kQkFree + ring.slot), ring.parity ^ 1);
      ptx::mbarrier_expect(barrier(kQkFull + ring.slot), kMemory.qk_bytes);
      load<kMemory.panels_qk, kColumns>(maps.qk, s_qk(ring.slot), kQkFull + ring.slot, past, row,
                                        head);
      ptx::mbarrier_wait(barrier(kVFree + ring.slot), ring.parity ^ 1);
      ptx::mbarrier_expect(barrier(kVFull + ring.slot), kMemory.v_bytes);
      load<kMemory.panels_v, kColumns>(maps.v, s_v(ring.slot), kVFull + ring.slot, past, row, head);
      ring.next();
    });
  }
  template <int kPanels, int kPanelRows>
  __device__ __forceinline__ void load(const CUtensorMap& map, uint32_t to, int full,
                                       const SideRows& of, int32_t row, int32_t head) const {
#pragma unroll 1
    for (int i = 0; i < kPanels; ++i) {
      ptx::tma_load_4d(to + i * panel_bytes(kPanelRows), &map, barrier(full), i * kPanelColumns,
                       of.first + row, head, of.batch_idx);
    }
  }

  // --- the second warp of a block of keys: numbers of the queries ---

  __device__ __forceinline__ void fetch_queries() const {
    Ring<kStages> ring;
    walk([&](int32_t head, int32_t tile) {
      ptx::mbarrier_wait(barrier(kQkFree + ring.slot), ring.parity ^ 1);
      queries(ring.slot).fetch(args, item, head, tile);
      ptx::mbarrier_arrive(barrier(kQkFull + ring.slot));
      ring.next();
    });
  }

  // --- consumers ---

  using Weights = GradientWeights<GradientBlock>;

  // What both kinds of consumers do with the stages.
  struct Stages {
    const GradientBlock& block;
    Ring<kStages> ring;

    __device__ __forceinline__ void wait(int full) const {
      ptx::mbarrier_wait(block.barrier(full + ring.slot), ring.parity);
    }
    // Behind all reads of the warp, of the queries' numbers too.
    __device__ __forceinline__ void release(int free) const {
      __syncwarp();
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(block.barrier(free + ring.slot));
    }
    __device__ __forceinline__ uint64_t qk() const {
      return ptx::panel_descriptor(block.s_qk(ring.slot), panel_bytes(kColumns));
    }
    __device__ __forceinline__ uint64_t v() const {
      return ptx::panel_descriptor(block.s_v(ring.slot), panel_bytes(kColumns));
    }
    __device__ __forceinline__ void begin_scores(float (&s)[kColumns / 2],
                                                 int32_t first_row) const {
      const uint64_t own = ptx::panel_descriptor(block.s_own_qk + panel_bytes(first_row));
      ptx::keep(s);
      issue_scores<T, kColumns, kRows, kDimQk / kStepColumns>(s, own, qk());
    }
    // d_out v^T, or its transpose.
    __device__ __forceinline__ void begin_products(float (&d)[kColumns / 2],
                                                   int32_t first_row) const {
      const uint64_t own = ptx::panel_descriptor(block.s_own_v() + panel_bytes(first_row));
      ptx::keep(d);
      issue_scores<T, kColumns, kRows, kDimV / kStepColumns>(d, own, v());
    }
    template <int kDim>
    static __device__ __forceinline__ void begin_sums(float (&sums)[kDim / 2],
                                                      uint32_t (&weights)[kColumns / 4],
                                                      uint64_t rows) {
      ptx::keep(sums);
      ptx::keep(weights);
      issue_values<T, kDim, kColumns / kStepColumns>(sums, weights, rows);
    }
  };

  // What TMA brought beside the rows to sum; a full tile has none. With roles the first one does
  // it, before it hands over the weights: the other spilled a register.
  static constexpr int kClearingThreads = kTile.has_roles ? 128 : kConsumerThreads;
  __device__ __forceinline__ void clear_qk(int32_t tile, int stage) const {
    clear(tile, kMemory.qk_offset + stage * kMemory.qk_bytes, kMemory.qk_bytes);
  }
  __device__ __forceinline__ void clear_v(int32_t tile, int stage) const {
    clear(tile, kMemory.v_offset + stage * kMemory.v_bytes, kMemory.v_bytes);
  }
  __device__ __forceinline__ void clear(int32_t tile, int offset, int bytes) const {
    const int32_t first = tile * kColumns;
    if (!item.brings_others(attention(), kSide, first, kColumns)) return;
    clear_absent_rows<kColumns, kClearingThreads>(s_memory + offset, bytes, first,
                                                  item.met_rows(kSide), kCleaned);
  }

  // Owns 64 rows: sums of dq, or of dk and dv.
  struct WholeConsumer {
    const GradientBlock& block;
    Weights weights;
    Stages stages;
    float r_qk[kDimQk / 2];
    float r_v[kIsKeys ? kDimV / 2 : 1];

    __device__ __forceinline__ WholeConsumer(const GradientBlock& block, int warpgroup)
        : block(block), weights(block, warpgroup * 64), stages{block, {}} {}

    template <bool kHides>
    __device__ __forceinline__ void work_on(int32_t tile) {
      float s[kColumns / 2], d[kColumns / 2];
      uint32_t r_p[kIsKeys ? kColumns / 4 : 1], r_ds[kColumns / 4];
      float2 shifts[Weights::kNumbers], deltas[Weights::kNumbers];
      const int stage = stages.ring.slot;
      stages.wait(kQkFull);
      if constexpr (kHides) block.clear_qk(tile, stage);
      stages.begin_scores(s, weights.first_row);
      weights.read(shifts, block.queries(stage).shifts());
      stages.wait(kVFull);
      if constexpr (kIsKeys && kHides) block.clear_v(tile, stage);
      stages.begin_products(d, weights.first_row);
      ptx::wgmma_wait<1>();
      ptx::keep(s);
      weights.template weigh<kHides>(s, r_p, shifts, tile, stage);
      if constexpr (kIsKeys) {
        stages.template begin_sums<kDimV>(r_v, r_p, stages.v());
        weights.read(deltas, block.queries(stage).deltas());
        ptx::wgmma_wait<1>();
        ptx::keep(d);
      } else {
        ptx::wgmma_wait<0>();
        ptx::keep(d);
        stages.release(kVFree);
      }
      weights.template differentiate<kHides>(d, r_ds, deltas, [&](int i) { return s[i]; });
      stages.template begin_sums<kDimQk>(r_qk, r_ds, stages.qk());
      ptx::wgmma_wait<0>();
      ptx::keep(r_qk);
      if constexpr (kIsKeys) {
        ptx::keep(r_v);
        ptx::keep(r_p);
        stages.release(kVFree);
      }
      ptx::keep(r_ds);
      stages.release(kQkFree);
      stages.ring.next();
    }

    __device__ __forceinline__ void run() {
#pragma unroll
      for (float& sum : r_qk) sum = 0;
#pragma unroll
      for (float& sum : r_v) sum = 0;
      ptx::mbarrier_wait(block.barrier(kOwnFull), 0);
      block.walk_with(*this);
      const GradientArgs& g = block.args.gradients;
      const AttentionArgs& a = block.attention();
      if constexpr (kIsKeys) {
        weights.store(r_qk, a.scale, g.dk, g.stride_dk, a.dim_qk);
        weights.store(r_v, 1 / Weights::kWeightScale, g.dv, g.stride_dv, a.dim_v);
      } else {
        weights.store(r_qk, a.scale, g.dq, g.stride_dq, a.dim_qk);
      }
    }
  };

  // The weights of a tile on their way between the roles: element i of thread t of a warpgroup.
  __device__ __forceinline__ float4* exchange() const {
    return reinterpret_cast<float4*>(s_memory + kMemory.exchange_offset) + threadIdx.x % 128;
  }

  // The first role: scores, weights, dv.
  struct ValuesConsumer {
    const GradientBlock& block;
    Weights weights;
    Stages stages;
    float r_v[kDimV / 2];
    bool has_written = false;

    __device__ __forceinline__ explicit ValuesConsumer(const GradientBlock& block)
        : block(block), weights(block, 0), stages{block, {}} {}

    template <bool kHides>
    __device__ __forceinline__ void work_on(int32_t tile) {
      float s[kColumns / 2];
      uint32_t r_p[kColumns / 4];
      float2 shifts[Weights::kNumbers];
      const int stage = stages.ring.slot;
      stages.wait(kQkFull);
      if constexpr (kHides) block.clear_qk(tile, stage);
      stages.begin_scores(s, 0);
      weights.read(shifts, block.queries(stage).shifts());
      ptx::wgmma_wait<0>();
      ptx::keep(s);
      weights.template weigh<kHides>(s, r_p, shifts, tile, stage);
      stages.release(kQkFree);
      stages.wait(kVFull);
      if constexpr (kHides) block.clear_v(tile, stage);
      stages.template begin_sums<kDimV>(r_v, r_p, stages.v());
      if (has_written) ptx::named_sync(kWeightsFree, kConsumerThreads);
#pragma unroll
      for (int i = 0; i < kColumns / 8; ++i) {
        block.exchange()[i * 128] = make_float4(s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]);
      }
      ptx::named_arrive(kWeightsFull, kConsumerThreads);
      has_written = true;
      ptx::wgmma_wait<0>();
      ptx::keep(r_v);
      ptx::keep(r_p);
      stages.release(kVFree);
      stages.ring.next();
    }

    __device__ __forceinline__ void run() {
#pragma unroll
      for (float& sum : r_v) sum = 0;
      ptx::mbarrier_wait(block.barrier(kOwnFull), 0);
      block.walk_with(*this);
      const GradientArgs& g = block.args.gradients;
      weights.store(r_v, 1 / Weights::kWeightScale, g.dv, g.stride_dv, block.attention().dim_v);
    }
  };

  // The second role: d_out v^T, gradients of scores, dk.
  struct KeysConsumer {
    const GradientBlock& block;
    Weights weights;
    Stages stages;
    float r_qk[kDimQk / 2];
    int32_t tiles_left;

    __device__ __forceinline__ explicit KeysConsumer(const GradientBlock& block)
        : block(block), weights(block, 0), stages{block, {}}, tiles_left(block.walk_tiles()) {}

    template <bool kHides>
    __device__ __forceinline__ void work_on(int32_t) {
      float s[kColumns / 2], d[kColumns / 2];
      uint32_t r_ds[kColumns / 4];
      float2 deltas[Weights::kNumbers];
      stages.wait(kVFull);
      stages.begin_products(d, 0);
      stages.wait(kQkFull);
      weights.read(deltas, block.queries(stages.ring.slot).deltas());
      ptx::named_sync(kWeightsFull, kConsumerThreads);
#pragma unroll
      for (int i = 0; i < kColumns / 8; ++i) {
        const float4 four = block.exchange()[i * 128];
        s[4 * i] = four.x;
        s[4 * i + 1] = four.y;
        s[4 * i + 2] = four.z;
        s[4 * i + 3] = four.w;
      }
      // Nobody waits behind the last tile.
      if (--tiles_left > 0) ptx::named_arrive(kWeightsFree, kConsumerThreads);
      ptx::wgmma_wait<0>();
      ptx::keep(d);
      stages.release(kVFree);
      weights.template differentiate<kHides>(d, r_ds, deltas, [&](int i) { return s[i]; });
      stages.template begin_sums<kDimQk>(r_qk, r_ds, stages.qk());
      ptx::wgmma_wait<0>();
      ptx::keep(r_qk);
      ptx::keep(r_ds);
      stages.release(kQkFree);
      stages.ring.next();
    }

    __device__ __forceinline__ void run() {
#pragma unroll
      for (float& sum : r_qk) sum = 0;
      ptx::mbarrier_wait(block.barrier(kOwnFull), 0);
      block.walk_with(*this);
      const GradientArgs& g = block.args.gradients;
      const AttentionArgs& a = block.attention();
      weights.store(r_qk, a.scale, g.dk, g.stride_dk, a.dim_qk);
    }
  };
};

template <Side kSide, int kDimQk, int kDimV, Dtype kDtype, Scores kScores>
__global__ void __launch_bounds__(kGradientThreads, 1)
    sm90_backward(const __grid_constant__ GradientMaps maps,
                  const __grid_constant__ GradientBlockArgs args) {
  using Block = GradientBlock<kSide, kDimQk, kDimV, kDtype, kScores>;
  extern __shared__ __align__(1024) unsigned char s_memory[];
  auto* item = reinterpret_cast<BackwardItem*>(s_memory + Block::kMemory.item_offset);
  const Block block{maps, args, *item, s_memory, ptx::shared_address(s_memory)};
  if (threadIdx.x == 0) {
    *item = BackwardItem(args.gradients, kSide, args.tiles,
                         args.first_item + static_cast<int32_t>(blockIdx.x), Block::kRows,
                         Block::kColumns);
    block.init_barriers();
  }
  __syncthreads();
  if (item->rows <= 0) return;
  // Shuffled, so that the compiler knows it to be the same for the warp.
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    ptx::registers_give<kGradientProducerRegisters>();
    if (threadIdx.x == 0) {
      block.produce();
    } else if (Block::kIsKeys && threadIdx.x >= 32 && threadIdx.x < 64) {
      block.fetch_queries();
    }
  } else {
    ptx::registers_take<kGradientConsumerRegisters>();
    if constexpr (!Block::kTile.has_roles) {
      typename Block::WholeConsumer(block, warpgroup - 1).run();
    } else if (warpgroup == 1) {
      typename Block::ValuesConsumer(block).run();
    } else {
      typename Block::KeysConsumer(block).run();
    }
  }
}

template <Side kSide, int kDimQk, int kDimV, Dtype kDtype, Scores kScores>
const void* sm90_backward_instance() {
  return reinterpret_cast<const void*>(&sm90_backward<kSide, kDimQk, kDimV, kDtype, kScores>);
}

}  // namespace wh::cuda
