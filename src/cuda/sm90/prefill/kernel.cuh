// sm90_prefill: many queries, heads up to 256 wide, on Hopper.
//
// Schedule. A block is persistent and takes one tile of 128 or 192 query rows after another, the
// longest first, from a counter (or in turn where all are equally long). One thread of the producer
// warpgroup loads Q and then K and V tiles by TMA, two stages each, from the last visible key to
// the first. Each consumer warpgroup owns 64 rows: it issues S = Q K(n)^T, then O += P V(n+1),
// finds the largest scores of S(n) while the second product runs, and weighs them while the other
// warpgroups' products do; P stays in registers. Three consumers (dim 64) issue in turn, so that
// one's softmax falls into another's products; two fall into that by themselves. The output goes
// from registers to memory, so that the next Q is on its way as soon as the last S is done. The
// other warps of the producer warpgroup clean V tiles in which some key is hidden from some row.
//
// Causal, windows, key lengths and starts and ragged ends are key ranges computed per tile: tiles
// outside are not loaded, tiles inside are not masked.
//
// Roofline: tensor cores, 4096 flops a clock and SM. 128 rows read a K and V tile from L2 once: 128
// flops a byte, 5.1 TB/s at 650 TFLOP/s, just inside what L2 gives (64 rows would not be). Softmax
// costs 128 / (dim_qk + dim_v) of the tensor time in exponentials alone: all of it at dim 64, a
// quarter at 256.
#pragma once

#include "cuda/common/clean_values.cuh"
#include "cuda/common/element.cuh"
#include "cuda/common/key_range.h"
#include "cuda/common/tile_order.h"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/common/key_boxes.cuh"
#include "cuda/sm90/common/products.cuh"
#include "cuda/sm90/common/query_rows.cuh"
#include "cuda/sm90/common/ring.cuh"
#include "cuda/sm90/common/tile_softmax.cuh"
#include "cuda/sm90/common/tile_walk.cuh"
#include "cuda/sm90/prefill/kernel.h"
#include "cuda/sm90/prefill/tiles.h"

namespace wh::cuda {

template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores, Layouts kLayouts>
struct PrefillBlock {
  using T = Element<kDtype>;
  static constexpr HeadDims kDims{kDimQk, kDimV};
  static constexpr PrefillTile kTile = prefill_tile(kDims, kScores, kLayouts);
  static constexpr PrefillMemory kMemory{kDims, kTile};
  static constexpr int kTileQ = kTile.tile_q();
  static constexpr int kTileK = kTile.tile_k;
  static constexpr int kStages = kTile.stages;
  static constexpr int kWarpgroups = kTile.warpgroups;
  static constexpr int kCleaners = 96;  // threads
  // Whether the consumers issue their products in turn, so that one is at softmax while another has
  // the tensor cores. Gains 3 % with three of them; two do so by themselves, and turns cost them up
  // to 1.5 % (dims 128 to 256).
  static constexpr bool kTakesTurns = kWarpgroups > 2;
  static constexpr bool kIsMasked = kScores == Scores::kMasked;
  static_assert(kMemory.bytes <= most_shared_bytes());

  // Barriers, 8 bytes each.
  enum Barrier {
    kQFull,
    kQFree,
    kKFull,
    kKFree = kKFull + kStages,
    kVFull = kKFree + kStages,  // and clean
    kVFree = kVFull + kStages,
    kVLoaded = kVFree + kStages,  // but not yet cleaned
    kBarriers = kVLoaded + kStages,
  };

  // Named barriers; 0 is __syncthreads().
  static constexpr int kCleanersBarrier = 1;
  static constexpr int kTurnBarrier = 2;  // one a consumer

  // Words that the producer warpgroup hands to the consumers.
  struct Mailbox {
    int32_t tile;  // index in the order; negative: no more
    // By the parity of a tile's number: the number + 1 of the last such tile in which cleaning lost
    // something. Nobody resets it: tiles without keys to wait for would read a flag that is just
    // being cleared.
    uint32_t dropped[2];
    ProducerNotes notes;
  };
  static_assert(kBarriers * 8 + sizeof(Mailbox) <= 256);

  const PrefillMaps& maps;
  const AttentionArgs& args;
  const TileOrder& order;
  unsigned char* s_memory;
  uint32_t s_q;  // the same in the shared window, where Q comes first

  __device__ __forceinline__ uint32_t barrier(int which) const {
    return s_q + kMemory.barrier_offset + which * 8;
  }
  __device__ __forceinline__ uint32_t s_k(int stage) const {
    return s_q + kMemory.k_offset + stage * kMemory.k_bytes;
  }
  __device__ __forceinline__ uint32_t s_v(int stage) const {
    return s_q + kMemory.v_offset + stage * kMemory.v_bytes;
  }
  __device__ __forceinline__ volatile Mailbox* mailbox() const {
    return reinterpret_cast<volatile Mailbox*>(s_memory + kMemory.barrier_offset + kBarriers * 8);
  }

  __device__ __forceinline__ void init_barriers() const {
    ptx::mbarrier_init(barrier(kQFull), 1);
    ptx::mbarrier_init(barrier(kQFree), 4 * kWarpgroups + 1);
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(barrier(kKFull + i), 1);
      ptx::mbarrier_init(barrier(kVFull + i), 1);
      ptx::mbarrier_init(barrier(kVLoaded + i), 1);
      ptx::mbarrier_init(barrier(kKFree + i), 4 * kWarpgroups);
      ptx::mbarrier_init(barrier(kVFree + i), 4 * kWarpgroups);
    }
    ptx::mbarrier_init_fence();
    for (int parity = 0; parity < 2; ++parity) mailbox()->dropped[parity] = 0;
  }

  // A tile's place in the problem and the keys it works on.
  using Work = WalkedTile<kLayouts>;
  __device__ __forceinline__ Work work(int32_t index) const {
    return walked_tile<kLayouts>(args, order, index, kTileK);
  }

  // --- producer: one thread, of pages and packed tensors one warp ---

  using Boxes = KeyBoxes<kLayouts>;
  using Producer = Producers<kLayouts>;

  __device__ __forceinline__ void produce() const {
    Ring<kStages> ring;
    KeptNotes<kLayouts> notes = kept_notes<kLayouts>(*mailbox());
    if (Producer::is_leader()) {
      notes.q_parity = 1;
      notes.tile =
          filled_tile<kLayouts>(args, order, gridDim.x, first_tile(order, blockIdx.x), kTileK);
    }
    while (true) {
      Producer::meet();
      const int32_t index = notes.tile;
      const bool is_last = index >= order.end;
      if (Producer::is_leader()) {
        ptx::mbarrier_wait(barrier(kQFree), notes.q_parity);
        notes.q_parity = notes.q_parity ^ 1;
        mailbox()->tile = is_last ? -1 : index;
      }
      if (is_last) {
        if (Producer::is_leader()) ptx::mbarrier_arrive(barrier(kQFull));
        return;
      }
      const Work w = work(index);
      const int32_t head_kv = w.at.first_head / args.group;
      if (Producer::is_leader()) {
        ptx::mbarrier_expect(barrier(kQFull), kMemory.panels_qk * panel_bytes(order.packed_heads *
                                                                              order.tile_queries));
#pragma unroll
        for (int i = 0; i < kMemory.panels_qk; ++i) {
          ptx::tma_load_5d(s_q + i * panel_bytes(kTileQ), &maps.q, barrier(kQFull),
                           i * kPanelColumns, w.at.first_head - head_kv * args.group,
                           w.sequence.first_query + w.at.first_query, head_kv,
                           w.sequence.query_batch, ptx::CacheHint::kEvictFirst);
        }
        note_keys(notes, w.keys);
      }
      Producer::meet();
      const Boxes boxes(args, maps.box_keys_log2, w.sequence);
#pragma unroll 1
      for (int32_t n = w.keys.end - 1; n >= notes.begin; --n) {
        const TileAt at{n * kTileK, head_kv};
        load<kMemory.panels_qk>(maps.k, boxes, at, s_k(ring.slot), ring.parity,
                                barrier(kKFree + ring.slot), barrier(kKFull + ring.slot));
        const int full = is_clean(notes, n) ? kVFull : kVLoaded;
        load<kMemory.panels_v>(maps.v, boxes, at, s_v(ring.slot), ring.parity,
                               barrier(kVFree + ring.slot), barrier(full + ring.slot));
        ring.next();
      }
      Producer::meet();
      if (Producer::is_leader()) {
        notes.tile = filled_tile<kLayouts>(args, order, gridDim.x,
                                           next_query_tile(order, gridDim.x, notes.tile), kTileK);
      }
    }
  }

  struct TileAt {
    int32_t key, head_kv;
  };
  template <int kPanels>
  __device__ __forceinline__ void load(const CUtensorMap& map, const Boxes& boxes, const TileAt& at,
                                       uint32_t to, uint32_t parity, uint32_t free,
                                       uint32_t full) const {
    ptx::mbarrier_wait(free, parity ^ 1);
    const int32_t rows = boxes.template count<kTileK>(at.key);
    Producer::meet();
    if (Producer::is_leader()) ptx::mbarrier_expect(full, kPanels * panel_bytes(rows));
    boxes.template copy_each<kTileK>(
        at.key, rows, [&](int32_t row, int32_t token, int32_t batch_idx) {
#pragma unroll 1
          for (int i = 0; i < kPanels; ++i) {
            ptx::tma_load_4d(to + i * panel_bytes(kTileK) + panel_bytes(row), &map, full,
                             i * kPanelColumns, token, at.head_kv, batch_idx,
                             ptx::CacheHint::kEvictLast);
          }
        });
  }

  // --- cleaners: the other three warps of the producer's warpgroup ---

  __device__ __forceinline__ void clean() const {
    Ring<kStages> ring;
    const bool is_first = threadIdx.x == 32;
    uint32_t loaded_parity = 0;  // a bit a stage: only tiles to be cleaned complete this barrier
    for (uint32_t number = 0;; ++number) {
      ptx::mbarrier_wait(barrier(kQFull), number % 2);
      const int32_t index = mailbox()->tile;
      ptx::named_sync(kCleanersBarrier, kCleaners);  // all have read the tile
      if (is_first) ptx::mbarrier_arrive(barrier(kQFree));
      if (index < 0) return;
      const Work w = work(index);
#pragma unroll 1
      for (int32_t n = w.keys.end - 1; n >= w.keys.begin; --n) {
        if (!w.keys.is_clean(n)) {
          ptx::mbarrier_wait(barrier(kVLoaded + ring.slot), loaded_parity >> ring.slot & 1);
          loaded_parity ^= 1u << ring.slot;
          const bool dropped = clean_values<T, kMemory.panels_v, kTileK, kCleaners>(
              s_memory + kMemory.v_offset + ring.slot * kMemory.v_bytes, w.sequence.present,
              n * kTileK, threadIdx.x - 32);
          // Before the stage is full: the consumers have waited for all of them when they look.
          if (dropped) mailbox()->dropped[number % 2] = number + 1;
          ptx::async_proxy_fence();
          ptx::named_sync(kCleanersBarrier, kCleaners);
          if (is_first) ptx::mbarrier_arrive(barrier(kVFull + ring.slot));
        }
        ring.next();
      }
    }
  }

  // --- consumers: a warpgroup has 64 rows ---

  struct Consumer {
    const PrefillBlock& block;
    int warpgroup;
    Ring<kStages> ring;
    TileSoftmax<T> softmax;
    float r_o[kDimV / 2];      // [64 rows, kDimV] of the warpgroup, unnormalised
    uint32_t r_p[kTileK / 4];  // [64 rows, kTileK], rounded to T

    __device__ __forceinline__ Consumer(const PrefillBlock& block, int warpgroup)
        : block(block), warpgroup(warpgroup), softmax(block.args, kScores) {}

    __device__ __forceinline__ bool is_first_lane() const { return threadIdx.x % 32 == 0; }

    // Who has the first turn waits for K and V for all: whoever is given the turn after it knows
    // that they are there.
    __device__ __forceinline__ bool waits() const { return !kTakesTurns || warpgroup == 0; }
    __device__ __forceinline__ void wait_keys() const {
      ptx::mbarrier_wait(block.barrier(kKFull + ring.slot), ring.parity);
    }
    __device__ __forceinline__ void wait_values(int stage, uint32_t parity) const {
      ptx::mbarrier_wait(block.barrier(kVFull + stage), parity);
    }

    __device__ __forceinline__ void begin_scores(float (&s)[kTileK / 2]) {
      const uint64_t q = ptx::panel_descriptor(block.s_q + panel_bytes(warpgroup * 64));
      const uint64_t k = ptx::panel_descriptor(block.s_k(ring.slot));
      ptx::keep(s);
      issue_scores<T, kTileK, kTileQ, kDimQk / kStepColumns>(s, q, k);
    }
    __device__ __forceinline__ void begin_values(int stage) {
      const uint64_t v = ptx::panel_descriptor(block.s_v(stage), panel_bytes(kTileK));
      ptx::keep(r_o);
      ptx::keep(r_p);
      issue_values<T, kDimV, kTileK / kStepColumns>(r_o, r_p, v);
    }

    // All consumers of a block take as many turns: they work on the same keys.
    __device__ __forceinline__ void take_turn() const {
      if constexpr (kTakesTurns) ptx::named_sync(kTurnBarrier + warpgroup, 256);
    }
    __device__ __forceinline__ void pass_turn_to(int next) const {
      if constexpr (kTakesTurns) ptx::named_arrive(kTurnBarrier + next, 256);
    }

    __device__ __forceinline__ void release(int which) {
      if (is_first_lane()) ptx::mbarrier_arrive(block.barrier(which));
    }

    __device__ __forceinline__ void first_tile(int32_t tile) {
      float s[kTileK / 2];
      wait_keys();
      begin_scores(s);
      ptx::wgmma_wait<0>();
      ptx::keep(s);
      release(kKFree + ring.slot);
      softmax.raise(s, tile * kTileK, true);
      softmax.weigh(s);
      softmax.pack(s, r_p);
    }

    // Scores of `tile` beside the values of the tile before.
    template <bool kHides>
    __device__ __forceinline__ void next_tile(int32_t tile) {
      const int v_stage = ring.slot;
      const uint32_t v_parity = ring.parity;
      ring.next();
      float s[kTileK / 2];
      if (waits()) wait_keys();
      take_turn();
      begin_scores(s);
      softmax.correct(r_o);
      if (waits()) wait_values(v_stage, v_parity);
      begin_values(v_stage);
      pass_turn_to((warpgroup + 1) % kWarpgroups);
      ptx::wgmma_wait<1>();
      ptx::keep(s);
      release(kKFree + ring.slot);
      // The addresses of an array mask need the registers of the weights under way.
      if constexpr (kIsMasked) finish_values(v_stage);
      softmax.raise(s, tile * kTileK, kHides);
      // Here, and not behind the exponentials: the other warpgroup's products fill the gap. One
      // row's exponentials in front of the wait gave nothing at dim 128 and cost 1 to 5 %
      // elsewhere.
      if constexpr (!kIsMasked) finish_values(v_stage);
      softmax.weigh(s);
      softmax.pack(s, r_p);
    }

    __device__ __forceinline__ void finish_values(int stage) {
      ptx::wgmma_wait<0>();
      ptx::keep(r_o);
      release(kVFree + stage);
    }

    __device__ __forceinline__ void last_values() {
      softmax.correct(r_o);
      wait_values(ring.slot, ring.parity);
      begin_values(ring.slot);
      finish_values(ring.slot);
      ring.next();
    }

    __device__ __forceinline__ QueryRows<T, Work> query_rows(const Work& w) const {
      return {block.args, w, block.order.packed_heads, block.order.tile_queries};
    }

    // Notes which keys this thread's rows see; returns which tiles the block works on.
    __device__ __forceinline__ KeyTiles enter(const Work& w) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        softmax.rows[r] = query_rows(w).scores(warpgroup * 64 + accumulator_row(r));
      }
      return w.keys;
    }

    __device__ __forceinline__ void store(const QueryRows<T, Work>& query_rows) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const auto place = query_rows.place(warpgroup * 64 + accumulator_row(r));
        query_rows.store_log_sum_exp(place, softmax.finish(r, query_rows.sink(place)));
        query_rows.store(r_o, r, place, softmax.norm(r), 0);
      }
    }

    __device__ __forceinline__ void run() {
      if (warpgroup == kWarpgroups - 1) pass_turn_to(0);
      for (uint32_t number = 0;; ++number) {
        ptx::mbarrier_wait(block.barrier(kQFull), number % 2);
        const int32_t index = block.mailbox()->tile;
        if (index < 0) return;
        const KeyTiles keys = enter(block.work(index));
        softmax.online = OnlineSoftmax{};
#pragma unroll
        for (int i = 0; i < kDimV / 2; ++i) r_o[i] = 0;
        int32_t n = keys.end - 1;
        if (n >= keys.begin) {
          first_tile(n--);
          walk_keys<kIsMasked>(
              keys, n, [&](int32_t tile) { next_tile<true>(tile); },
              [&](int32_t tile) { next_tile<false>(tile); });
          __syncwarp();
          release(kQFree);
          last_values();
        } else {
          __syncwarp();
          release(kQFree);
        }
        const Work w = block.work(index);
        store(query_rows(w));
        if (block.mailbox()->dropped[number % 2] == number + 1) {
          query_rows(w).restore(kTileK, warpgroup * 64, softmax.online.correction, 0, kDimV);
        }
      }
    }
  };
};

template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores, Layouts kLayouts>
__global__ void __launch_bounds__(prefill_tile({kDimQk, kDimV}, kScores, kLayouts).threads(), 1)
    sm90_prefill(const __grid_constant__ PrefillMaps maps,
                 const __grid_constant__ AttentionArgs args,
                 const __grid_constant__ TileOrder order) {
  using Block = PrefillBlock<kDimQk, kDimV, kDtype, kScores, kLayouts>;
  constexpr PrefillTile kTile = Block::kTile;
  extern __shared__ __align__(1024) unsigned char s_memory[];
  const Block block{maps, args, order, s_memory, ptx::shared_address(s_memory)};
  if (threadIdx.x == 0) {
    block.init_barriers();
    ptx::tma_prefetch(&maps.q);
    ptx::tma_prefetch(&maps.k);
    ptx::tma_prefetch(&maps.v);
  }
  __syncthreads();
  // Shuffled, so that the compiler knows it to be the same for the warp: descriptors that depend on
  // it then stay in uniform registers (16 moves a tile less).
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    ptx::registers_give<kTile.producer_registers>();
    if (threadIdx.x < Block::Producer::kThreads) {
      block.produce();
    } else if (threadIdx.x >= 32) {
      block.clean();
    }
  } else {
    ptx::registers_take<kTile.consumer_registers>();
    typename Block::Consumer consumer(block, warpgroup - 1);
    consumer.run();
  }
}

template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores, Layouts kLayouts>
const void* prefill_instance() {
  return reinterpret_cast<const void*>(&sm90_prefill<kDimQk, kDimV, kDtype, kScores, kLayouts>);
}

}  // namespace wh::cuda
