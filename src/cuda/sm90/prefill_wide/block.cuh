// What a block of sm90_prefill_wide has in common: its shared memory and barriers, which tile it
// works on, the producer thread that fills the rings, and the warps that clean V.
#pragma once

#include "cuda/common/clean_values.cuh"
#include "cuda/common/element.cuh"
#include "cuda/common/key_range.h"
#include "cuda/common/tile_order.h"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/common/key_boxes.cuh"
#include "cuda/sm90/common/panels.h"
#include "cuda/sm90/common/ring.cuh"
#include "cuda/sm90/common/tile_walk.cuh"
#include "cuda/sm90/prefill_wide/kernel.h"
#include "cuda/sm90/prefill_wide/tiles.h"

namespace wh::cuda {

template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores, Layouts kLayouts>
struct WideBlock {
  using T = Element<kDtype>;
  static constexpr HeadDims kDims{kDimQk, kDimV};
  static constexpr Scores kScoresOf = kScores;
  static constexpr bool kWidens = false;
  static constexpr WideTile kTile = wide_tile(kDims, kScores, kLayouts);
  static constexpr WideMemory kMemory{kDims, kTile};
  static constexpr int kTileK = kTile.tile_k;
  static constexpr int kSlots = kTile.left_slots + kTile.right_slots;
  static constexpr int kHalf = 256;  // columns of V that a warpgroup owns
  static constexpr int kProductColumns = kHalf;
  static constexpr int kVRows = kWideValueRows;
  static constexpr int kPanelsOfKSlot = wide_panels_of_slot(kTile);
  static constexpr int kKSlotBytes = kPanelsOfKSlot * panel_bytes(kTileK);
  static constexpr int kKSlots = (kMemory.panels_qk + kPanelsOfKSlot - 1) / kPanelsOfKSlot;
  static constexpr int kVSlots = kTileK / kVRows;  // of one half
  static constexpr int kCleaners = 96;             // threads
  static constexpr uint16_t kBothBlocks = 3;
  static_assert(kDimV == 2 * kHalf && kMemory.bytes <= most_shared_bytes());

  enum Barrier {
    kTileFull,  // the index of the next tile has come
    kTileFree,  // counted in block 0: everybody in the cluster has read it
    kQFull,
    kQFree,
    kSlotFull,                         // and clean
    kSlotFree = kSlotFull + kSlots,    // in both blocks
    kSlotLoaded = kSlotFree + kSlots,  // but not yet cleaned
    kBarriers = kSlotLoaded + kSlots,
  };
  enum NamedBarrier {  // 0 is __syncthreads()
    kCleanersBarrier = 1,
    kWeightsFull,
    kWeightsFree,
    kNormFull,
    kNormFree,
  };

  struct Mailbox {
    // Index in the order; negative: no more. Block 0 stores it in both blocks and arrives with
    // release at kTileFull, where readers wait with acquire: 2 barriers of memory a tile, which
    // does not show. By st.async, whose bytes the barrier counts, a reader could be let through
    // before the word had come: warps then worked on different tiles, and the cluster stood still,
    // about once in a hundred launches of 128 tiles of a key or two. Asking again until a word with
    // the tile's number came let the lanes of a warp part, and barriers count warps.
    int32_t tile;
    // By the parity of a tile's number, and the half: the number + 1 of the last such tile in which
    // cleaning that half of V lost something. A half's warpgroup has waited for all of its own
    // slots when it looks, not for the other's. Nobody resets it: tiles without keys to wait for
    // would read a flag that is just being cleared.
    uint32_t dropped[2][2];
    ProducerNotes notes;
  };
  static_assert(kBarriers * 8 + sizeof(Mailbox) <= 512);

  // A ring for each warpgroup: in a common one a warpgroup that skips the other's slots could be
  // two fills ahead of a barrier's parity.
  using LeftRing = Ring<kTile.left_slots>;
  using RightRing = Ring<kTile.right_slots, kTile.left_slots>;

  const PrefillMaps& maps;
  const AttentionArgs& args;
  const TileOrder& order;
  unsigned char* s_memory;
  uint32_t s_q;  // the same in the shared window, where Q comes first
  uint32_t rank;

  __device__ __forceinline__ uint32_t barrier(int which) const {
    return s_q + kMemory.barrier_offset + which * 8;
  }
  __device__ __forceinline__ uint32_t s_slot(int slot) const {
    return s_q + kMemory.ring_offset + slot * kWideSlotBytes;
  }
  __device__ __forceinline__ uint32_t s_weights() const { return s_q + kMemory.p_offset; }
  // Row factors: [64] corrections, [64] norms.
  __device__ __forceinline__ float* s_factors() const {
    return reinterpret_cast<float*>(s_memory + kMemory.factor_offset);
  }
  static constexpr int kNorms = kWideTileQ;
  __device__ __forceinline__ volatile Mailbox* mailbox() const {
    return reinterpret_cast<volatile Mailbox*>(s_memory + kMemory.barrier_offset + kBarriers * 8);
  }

  // Of Mailbox::tile.
  __device__ __forceinline__ uint32_t s_tile() const { return barrier(kBarriers); }

  __device__ __forceinline__ void init_barriers() const {
    ptx::mbarrier_init(barrier(kTileFull), 1);
    // Eight consumer warps and the cleaners of each block, and the producer of block 1.
    ptx::mbarrier_init(barrier(kTileFree), kWideCluster * 9 + 1);
    ptx::mbarrier_init(barrier(kQFull), 1);
    ptx::mbarrier_init(barrier(kQFree), 4);
    for (int i = 0; i < kSlots; ++i) {
      ptx::mbarrier_init(barrier(kSlotFull + i), 1);
      ptx::mbarrier_init(barrier(kSlotLoaded + i), 1);
      ptx::mbarrier_init(barrier(kSlotFree + i), kWideCluster * 4);
    }
    ptx::mbarrier_init_fence();
    for (int i = 0; i < 4; ++i) mailbox()->dropped[i / 2][i % 2] = 0;
  }

  // `at` is of this block, `keys` of the cluster.
  using Work = WalkedTile<kLayouts>;
  __device__ __forceinline__ int32_t block_queries() const {
    return order.tile_queries / kWideCluster;
  }
  __device__ __forceinline__ Work work(int32_t index) const {
    Work w = walked_tile<kLayouts>(args, order, index, kTileK);
    w.at.first_query += rank * block_queries();
    return w;
  }

  // The tile with this number, for everybody but the producers.
  __device__ __forceinline__ int32_t read_tile(uint32_t number) const {
    ptx::mbarrier_acquire(barrier(kTileFull), number % 2);
    return ptx::load_word(s_tile());
  }
  // By one lane, once its warp has.
  __device__ __forceinline__ void release_tile(uint32_t) const {
    ptx::mbarrier_arrive_at(barrier(kTileFree), 0);
  }
  // By a warp, to both blocks: either loads the next half of the slot for both.
  __device__ __forceinline__ void release_slot(int slot) const {
    const uint32_t lane = threadIdx.x % 32;
    if (lane < kWideCluster) ptx::mbarrier_arrive_at(barrier(kSlotFree + slot), lane);
  }
  __device__ __forceinline__ void release_queries() const {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier(kQFree));
  }
  // Of half a tile of queries.
  __device__ __forceinline__ volatile uint32_t& dropped(uint32_t number, int half) const {
    return mailbox()->dropped[number % 2][half];
  }

  // --- producer: one thread, of pages and packed tensors one warp ---

  using Boxes = KeyBoxes<kLayouts>;
  using BoxPlace = typename Boxes::Place;
  using Producer = Producers<kLayouts>;

  __device__ __forceinline__ void produce() const {
    LeftRing left;
    RightRing right;
    const int32_t clusters = gridDim.x / kWideCluster;
    const bool is_leader = Producer::is_leader();
    KeptNotes<kLayouts> notes = kept_notes<kLayouts>(*mailbox());
    int32_t index = first_tile(order, blockIdx.x / kWideCluster);
    for (uint32_t number = 0;; ++number) {
      if (rank == 0 && is_leader) {
        if (number > 0) index = next_query_tile(order, clusters, notes.tile);
        index = filled_tile<kLayouts>(args, order, clusters, index, kTileK);
        ptx::mbarrier_acquire(barrier(kTileFree), (number + 1) % 2);
        for (uint32_t block = 0; block < kWideCluster; ++block) {
          ptx::store_at(s_tile(), block, index < order.end ? index : -1);
          ptx::mbarrier_release_at(barrier(kTileFull), block);
        }
      }
      Producer::meet();
      index = read_tile(number);
      Producer::meet();  // all have read the tile
      if (is_leader) {
        notes.tile = index;
        if (rank != 0) ptx::mbarrier_arrive_at(barrier(kTileFree), 0);
      }
      if (index < 0) return;
      const Work w = work(index);
      const int32_t head_kv = w.at.first_head / args.group;
      if (is_leader) {
        ptx::mbarrier_wait(barrier(kQFree), (number + 1) % 2);
        ptx::mbarrier_expect(barrier(kQFull),
                             kMemory.panels_qk * panel_bytes(order.packed_heads * block_queries()));
#pragma unroll 1
        for (int i = 0; i < kMemory.panels_qk; ++i) {
          ptx::tma_load_5d(s_q + i * panel_bytes(kWideTileQ), &maps.q, barrier(kQFull),
                           i * kPanelColumns, w.at.first_head - head_kv * args.group,
                           w.sequence.first_query + w.at.first_query, head_kv,
                           w.sequence.query_batch, ptx::CacheHint::kEvictFirst);
        }
        note_keys(notes, w.keys);
      }
      Producer::meet();
      const Boxes boxes(args, maps.box_keys_log2, w.sequence);
      BoxPlace next = boxes.find((w.keys.end - 1) * kTileK), place = next;
#pragma unroll 1
      for (int32_t n = w.keys.end - 1; n >= notes.begin; --n) {
        const BoxPlace ahead = boxes.find((n - 1) * kTileK);
        load_keys(left, boxes, {n * kTileK, head_kv, next});
        if (n + 1 < w.keys.end) {
          load_values(left, right, boxes, {(n + 1) * kTileK, head_kv, place},
                      is_clean(notes, n + 1));
        }
        place = next;
        next = ahead;
      }
      if (w.keys.end > notes.begin) {
        load_values(left, right, boxes, {notes.begin * kTileK, head_kv, place},
                    is_clean(notes, notes.begin));
      }
    }
  }

  struct TileAt {
    int32_t key, head_kv;
    BoxPlace place;
  };
  // A slot is two boxes: halves of the rows of one panel, or two panels. This block's is number
  // `rank`.
  __device__ __forceinline__ void load_keys(LeftRing& ring, const Boxes& boxes,
                                            const TileAt& at) const {
    const int32_t tile_rows = boxes.template count<kTileK>(at.key);
#pragma unroll 1
    for (int i = 0; i < kKSlots; ++i) {
      ptx::mbarrier_wait(barrier(kSlotFree + ring.slot), ring.parity ^ 1);
      Producer::meet();
      if (Producer::is_leader()) {
        ptx::mbarrier_expect(barrier(kSlotFull + ring.slot),
                             kPanelsOfKSlot * panel_bytes(tile_rows));
      }
      const int panel = kPanelsOfKSlot == 1 ? i : 2 * i + rank;
      // The other block's rows, of one panel, end where this one's begin.
      const int32_t first_row = kPanelsOfKSlot == 1 ? rank * (kTileK / 2) : 0;
      constexpr int kRows = kPanelsOfKSlot == 1 ? kTileK / 2 : kTileK;
      boxes.template copy_rows<kRows>(
          at.place, at.key + first_row, first_row,
          [&](int32_t row, int32_t token, int32_t batch_idx) {
            ptx::tma_multicast_4d(s_slot(ring.slot) + rank * (kKSlotBytes / 2) + panel_bytes(row),
                                  &maps.k, barrier(kSlotFull + ring.slot), panel * kPanelColumns,
                                  token, at.head_kv, batch_idx, kBothBlocks);
          });
      ring.next();
    }
  }

  __device__ __forceinline__ void load_values(LeftRing& left, RightRing& right, const Boxes& boxes,
                                              const TileAt& at, bool is_clean) const {
#pragma unroll 1
    for (int i = 0; i < kVSlots; ++i) {
      const TileAt slot{at.key + i * kVRows, at.head_kv, at.place};
      load_value_slot(left, boxes, slot, i * kVRows, 0, is_clean);
      load_value_slot(right, boxes, slot, i * kVRows, kHalf, is_clean);
    }
  }

  // A slot is four panels of 32 rows, of its tile from `first_row` on; this block loads two.
  template <typename RingOfHalf>
  __device__ __forceinline__ void load_value_slot(RingOfHalf& ring, const Boxes& boxes,
                                                  const TileAt& at, int32_t first_row,
                                                  int32_t first_column, bool is_clean) const {
    const uint32_t full = barrier((is_clean ? kSlotFull : kSlotLoaded) + ring.slot);
    const int32_t rows = boxes.template count<kVRows>(at.key);
    ptx::mbarrier_wait(barrier(kSlotFree + ring.slot), ring.parity ^ 1);
    Producer::meet();
    if (Producer::is_leader()) {
      ptx::mbarrier_expect(full, kHalf / kPanelColumns * panel_bytes(rows));
    }
    boxes.template copy_rows<kVRows>(
        at.place, at.key, first_row, [&](int32_t row, int32_t token, int32_t batch_idx) {
#pragma unroll 1
          for (uint32_t panel = 2 * rank; panel < 2 * rank + 2; ++panel) {
            ptx::tma_multicast_4d(
                s_slot(ring.slot) + panel * panel_bytes(kVRows) + panel_bytes(row), &maps.v, full,
                first_column + panel * kPanelColumns, token, at.head_kv, batch_idx, kBothBlocks);
          }
        });
    ring.next();
  }

  // --- cleaners: the other three warps of the producer's warpgroup ---

  __device__ __forceinline__ void clean() const {
    const bool is_first = threadIdx.x == 32;
    LeftRing left;
    RightRing right;
    uint32_t loaded_parity = 0;  // a bit a slot: only slots to be cleaned complete this barrier
    for (uint32_t number = 0;; ++number) {
      const int32_t index = read_tile(number);
      ptx::named_sync(kCleanersBarrier, kCleaners);  // all have read the tile
      if (is_first) release_tile(number);
      if (index < 0) return;
      const Work w = work(index);
      const auto clean_slot = [&](int slot, int half, int32_t key) {
        ptx::mbarrier_wait(barrier(kSlotLoaded + slot), loaded_parity >> slot & 1);
        loaded_parity ^= 1u << slot;
        const bool has_dropped = clean_values<T, kHalf / kPanelColumns, kVRows, kCleaners>(
            s_memory + kMemory.ring_offset + slot * kWideSlotBytes, w.sequence.present, key,
            threadIdx.x - 32);
        // Before the slot is full, so that whoever has waited for it knows.
        if (has_dropped) dropped(number, half) = number + 1;
        ptx::async_proxy_fence();
        ptx::named_sync(kCleanersBarrier, kCleaners);
        if (is_first) ptx::mbarrier_arrive(barrier(kSlotFull + slot));
      };
      if (w.keys.end > w.keys.begin) skip_keys(left);
#pragma unroll 1
      for (int32_t n = w.keys.end - 1; n >= w.keys.begin; --n) {
        if (n > w.keys.begin) skip_keys(left);
        const bool is_clean = w.keys.is_clean(n);
#pragma unroll 1
        for (int i = 0; i < kVSlots; ++i) {
          const int32_t key = n * kTileK + i * kVRows;
          if (!is_clean) {
            clean_slot(left.slot, 0, key);
            clean_slot(right.slot, 1, key);
          }
          left.next();
          right.next();
        }
      }
    }
  }

  __device__ __forceinline__ void skip_keys(LeftRing& ring) const {
#pragma unroll 1
    for (int i = 0; i < kKSlots; ++i) ring.next();
  }
};

}  // namespace wh::cuda
