// What a block of sm90_prefill_wide has in common where K and V are codes: as WideBlock, of which
// it has what the consumers ask for, but each block loads and widens for itself.
#pragma once

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
#include "cuda/sm90/common/widen.cuh"
#include "cuda/sm90/prefill_wide/code_slots.cuh"
#include "cuda/sm90/prefill_wide/kernel.h"
#include "cuda/sm90/prefill_wide/tiles.h"

namespace wh::cuda {

template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores, Layouts kLayouts>
struct WideCodeBlock {
  using T = Element<kDtype>;
  static constexpr HeadDims kDims{kDimQk, kDimV};
  static constexpr Scores kScoresOf = kScores;
  static constexpr bool kWidens = true;
  static constexpr WideTile kTile = wide_code_tile(kDims, kScores, kLayouts);
  static constexpr WideMemory kMemory{kDims, kTile};
  static constexpr int kTileK = kTile.tile_k;
  static constexpr int kSlots = kTile.left_slots + kTile.right_slots;
  static constexpr int kLoadSlots = kTile.load_slots;
  static constexpr int kHalf = 256;  // columns of V that a warpgroup owns
  static constexpr int kProductColumns = 128;
  static constexpr int kVRows = kWideValueRows;
  static constexpr int kPanelsOfKSlot = wide_panels_of_slot(kTile);
  static constexpr int kKSlots = (kMemory.panels_qk + kPanelsOfKSlot - 1) / kPanelsOfKSlot;
  static constexpr int kVSlots = kTileK / kVRows;                // of one half
  static constexpr int kStoredColumns = 2 * kPanelColumns;       // of a panel that TMA brings
  static constexpr int kStoredPanelsV = kHalf / kStoredColumns;  // of a slot
  static constexpr int kWideningWarps = kTile.widening_warps();
  static_assert(kPanelsOfKSlot * kPanelColumns == kStoredColumns && kDimQk % kStoredColumns == 0 &&
                kDimV == 2 * kHalf && kMemory.bytes <= most_shared_bytes());

  // Tiles of queries are told to everybody one by one, in two words, so that those who widen may be
  // at the next one while the consumers are still at the last.
  static constexpr int kToldTiles = 2;
  enum Barrier {
    kTileFull,
    kTileFree = kTileFull + kToldTiles,
    kQFull = kTileFree + kToldTiles,
    kQFree,
    kSlotFull,  // widened, and clean
    kSlotFree = kSlotFull + kSlots,
    kLoadFull = kSlotFree + kSlots,
    kLoadFree = kLoadFull + kLoadSlots,
    kBarriers = kLoadFree + kLoadSlots,
  };
  enum NamedBarrier {  // 0 is __syncthreads()
    kWeightsFull = 1,
    kWeightsFree,
    kNormFull,
    kNormFree,
  };

  struct Mailbox {
    int32_t tile[kToldTiles];  // by the parity of its number: index in the order; negative: no more
    // By a tile's number and the half, as in WideBlock. Those who widen may be two tiles ahead of
    // the last consumer.
    uint32_t dropped[4][2];
    WidenerNotes widener_notes[kWideningWarps];
    ProducerNotes notes;
  };
  static_assert(kBarriers * 8 + sizeof(Mailbox) <= kMemory.bytes - kMemory.barrier_offset);

  // Codes come in the order in which they are read: the left warpgroup's and the right one's.
  using LoadRing = Ring<kLoadSlots>;
  using LeftRing = Ring<kTile.left_slots>;
  using RightRing = Ring<kTile.right_slots, kTile.left_slots>;

  const PrefillMaps& maps;
  const AttentionArgs& args;
  const TileOrder& order;
  unsigned char* s_memory;
  uint32_t s_q;  // the same in the shared window, where Q comes first
  const StoredTensors& stored;

  __device__ __forceinline__ uint32_t barrier(int which) const {
    return s_q + kMemory.barrier_offset + which * 8;
  }
  __device__ __forceinline__ uint32_t s_slot(int slot) const {
    return s_q + kMemory.ring_offset + slot * kWideSlotBytes;
  }
  __device__ __forceinline__ static constexpr int load_offset(int slot) {
    return kMemory.load_offset + slot * (kWideSlotBytes / 2);
  }
  __device__ __forceinline__ static int scale_offset(uint32_t key_tile, bool is_v) {
    const uint32_t slot = key_tile % kCodeScaleSlots;
    return kMemory.scales_offset + (2 * slot + (is_v ? 1 : 0)) * kMemory.scale_bytes;
  }
  __device__ __forceinline__ const void* scales(uint32_t key_tile, bool is_v) const {
    return s_memory + scale_offset(key_tile, is_v);
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

  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < kToldTiles; ++i) {
      ptx::mbarrier_init(barrier(kTileFull + i), 1);
      ptx::mbarrier_init(barrier(kTileFree + i), 8 + kWideningWarps);
    }
    ptx::mbarrier_init(barrier(kQFull), 1);
    ptx::mbarrier_init(barrier(kQFree), 4);
    for (int i = 0; i < kSlots; ++i) {
      ptx::mbarrier_init(barrier(kSlotFull + i), kWideningWarps);
      ptx::mbarrier_init(barrier(kSlotFree + i), 4);
    }
    for (int i = 0; i < kLoadSlots; ++i) {
      ptx::mbarrier_init(barrier(kLoadFull + i), 1);
      ptx::mbarrier_init(barrier(kLoadFree + i), kWideningWarps);
    }
    ptx::mbarrier_init_fence();
    for (int i = 0; i < 8; ++i) mailbox()->dropped[i / 2][i % 2] = 0;
  }

  using Work = WalkedTile<kLayouts>;
  __device__ __forceinline__ int32_t block_queries() const { return order.tile_queries; }
  __device__ __forceinline__ Work work(int32_t index) const {
    return walked_tile<kLayouts>(args, order, index, kTileK);
  }

  // The tile with this number, for everybody but the producer.
  __device__ __forceinline__ int32_t read_tile(uint32_t number) const {
    ptx::mbarrier_wait(barrier(kTileFull + number % kToldTiles), number / kToldTiles % 2);
    return mailbox()->tile[number % kToldTiles];
  }
  // By one lane, once its warp has.
  __device__ __forceinline__ void release_tile(uint32_t number) const {
    ptx::mbarrier_arrive(barrier(kTileFree + number % kToldTiles));
  }
  // By a warp.
  __device__ __forceinline__ void release_slot(int slot) const {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier(kSlotFree + slot));
  }
  // By a warp, all of which has waited for Q.
  __device__ __forceinline__ void release_queries() const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier(kQFree));
  }
  __device__ __forceinline__ volatile uint32_t& dropped(uint32_t number, int half) const {
    return mailbox()->dropped[number % 4][half];
  }

  // --- producer: one thread, of pages and packed tensors one warp ---

  using Boxes = KeyBoxes<kLayouts>;
  using BoxPlace = typename Boxes::Place;
  using Producer = Producers<kLayouts>;

  // The first keys are asked for while the consumers still have the Q of the tile before, and are
  // widened by the time that Q is there.
  __device__ __forceinline__ void produce() const {
    LoadRing ring;
    KeptNotes<kLayouts> notes = kept_notes<kLayouts>(*mailbox());
    if (Producer::is_leader()) {
      notes.tile =
          filled_tile<kLayouts>(args, order, gridDim.x, first_tile(order, blockIdx.x), kTileK);
    }
    for (uint32_t number = 0;; ++number) {
      Producer::meet();
      const int32_t index = notes.tile;
      const bool is_last = index >= order.end;
      if (Producer::is_leader()) {
        const uint32_t word = number % kToldTiles;
        ptx::mbarrier_wait(barrier(kTileFree + word), number / kToldTiles % 2 ^ 1);
        mailbox()->tile[word] = is_last ? -1 : index;
        ptx::mbarrier_arrive(barrier(kTileFull + word));
      }
      if (is_last) return;
      const Work w = work(index);
      const int32_t head_kv = w.at.first_head / args.group;
      const Boxes boxes(args, maps.box_keys_log2, w.sequence);
      if (Producer::is_leader()) note_keys(notes, w.keys);
      Producer::meet();
      int32_t n = w.keys.end - 1;
      BoxPlace place = boxes.find(n * kTileK), next = boxes.find((n - 1) * kTileK);
      if (n >= notes.begin) load_keys(ring, boxes, n * kTileK, head_kv, place);
      if (Producer::is_leader()) {
        ptx::mbarrier_wait(barrier(kQFree), (number + 1) % 2);
        load_queries(work(index));
      }
      Producer::meet();
#pragma unroll 1
      for (; n >= notes.begin; --n) {
        const BoxPlace ahead = boxes.find((n - 2) * kTileK);
        if (n > notes.begin) load_keys(ring, boxes, (n - 1) * kTileK, head_kv, next);
        load_values(ring, boxes, n * kTileK, head_kv, place);
        place = next;
        next = ahead;
      }
      Producer::meet();
      if (Producer::is_leader()) {
        notes.tile = filled_tile<kLayouts>(args, order, gridDim.x,
                                           next_query_tile(order, gridDim.x, notes.tile), kTileK);
      }
    }
  }

  __device__ __forceinline__ void load_queries(const Work& w) const {
    const int32_t head_kv = w.at.first_head / args.group;
    ptx::mbarrier_expect(barrier(kQFull),
                         kMemory.panels_qk * panel_bytes(order.packed_heads * order.tile_queries));
#pragma unroll 1
    for (int i = 0; i < kMemory.panels_qk; ++i) {
      ptx::tma_load_5d(s_q + i * panel_bytes(kWideTileQ), &maps.q, barrier(kQFull),
                       i * kPanelColumns, w.at.first_head - head_kv * args.group,
                       w.sequence.first_query + w.at.first_query, head_kv, w.sequence.query_batch,
                       ptx::CacheHint::kEvictFirst);
    }
  }

  __device__ __forceinline__ void load_keys(LoadRing& ring, const Boxes& boxes, int32_t key,
                                            int32_t head_kv, const BoxPlace& place) const {
#pragma unroll 1
    for (int i = 0; i < kKSlots; ++i) {
      load<kTileK, 1>(ring, maps.k, boxes, {key, head_kv, i * kStoredColumns, 0, place});
    }
  }
  __device__ __forceinline__ void load_values(LoadRing& ring, const Boxes& boxes, int32_t key,
                                              int32_t head_kv, const BoxPlace& place) const {
#pragma unroll 1
    for (int i = 0; i < 2 * kVSlots; ++i) {
      load<kVRows, kStoredPanelsV>(
          ring, maps.v, boxes,
          {key + i / 2 * kVRows, head_kv, i % 2 * kHalf, i / 2 * kVRows, place});
    }
  }

  struct CodesFrom {
    int32_t key, head_kv, column;
    int32_t row;  // of its tile
    BoxPlace place;
  };
  // A slot: kRows rows in panels of 128 codes.
  template <int kRows, int kPanels>
  __device__ __forceinline__ void load(LoadRing& ring, const CUtensorMap& map, const Boxes& boxes,
                                       const CodesFrom& from) const {
    static_assert(kPanels * panel_bytes(kRows) == kWideSlotBytes / 2);
    const uint32_t full = barrier(kLoadFull + ring.slot);
    ptx::mbarrier_wait(barrier(kLoadFree + ring.slot), ring.parity ^ 1);
    const int32_t rows = boxes.template count<kRows>(from.key);
    Producer::meet();
    if (Producer::is_leader()) ptx::mbarrier_expect(full, kPanels * panel_bytes(rows));
    boxes.template copy_rows<kRows>(
        from.place, from.key, from.row, [&](int32_t row, int32_t token, int32_t batch_idx) {
#pragma unroll 1
          for (int i = 0; i < kPanels; ++i) {
            ptx::tma_load_4d(
                s_q + load_offset(ring.slot) + i * panel_bytes(kRows) + panel_bytes(row), &map,
                full, from.column + i * kStoredColumns, token, from.head_kv, batch_idx,
                ptx::CacheHint::kEvictLast);
          }
        });
    ring.next();
  }

  // --- the warps beside the producer's ---

  struct Widener : ScaleCopies<WideCodeBlock> {
    using ScaleCopies<WideCodeBlock>::block;
    LoadRing loads;
    LeftRing left;
    RightRing right;
    uint32_t key_tiles;  // whose scales were asked for
    int first;           // block of this warp of the next slot (WidenedSlot)

    __device__ __forceinline__ explicit Widener(const WideCodeBlock& block)
        : ScaleCopies<WideCodeBlock>{block}, key_tiles(0), first(threadIdx.x / 32 - 1) {}

    __device__ __forceinline__ static bool is_first_lane() { return threadIdx.x % 32 == 0; }

    __device__ __forceinline__ void run() {
      for (uint32_t number = 0;; ++number) {
        const int32_t index = block.read_tile(number);
        __syncwarp();
        if (is_first_lane()) block.release_tile(number);
        if (index < 0) return;
        const Work w = block.work(index);
        if (w.keys.end <= w.keys.begin) continue;
        this->note(w);
        const bool scales_k = multiplies_scores<kScores>(block.args, block.stored.k, w);
        const bool scales_v = has_token_scales(block.stored.v);
        // A step: the scales of one tile of keys are asked for, K of the one before it and V of the
        // one before that are widened. The slot that these scales take is that of four tiles ago,
        // and the left ring is shorter than what has come into it since.
#pragma unroll 1
        for (int32_t n = w.keys.end - 1; n + 2 >= w.keys.begin; --n) {
          const bool asks = n >= w.keys.begin;
          if (asks) {
            if (scales_k) {
              this->request_scales(n, block.stored.k, scale_offset(key_tiles, false));
            }
            if (scales_v) {
              this->request_scales(n, block.stored.v, scale_offset(key_tiles, true));
            }
            ptx::cp_async_commit();
            ++key_tiles;
          }
          if (n + 1 >= w.keys.begin && n + 1 < w.keys.end) {
            widen_keys([&] {
              this->await_scales(asks);
              if (scales_v && !w.keys.is_clean(n + 1) &&
                  this->clean_scales(key_tiles - (asks ? 2 : 1))) {
                block.dropped(number, 0) = number + 1;
                block.dropped(number, 1) = number + 1;
              }
            });
          }
          if (n + 2 < w.keys.end) widen_values((n + 2) * kTileK, w.keys.is_clean(n + 2), number);
        }
      }
    }

    template <int kRows, int kDim>
    using Slot = WidenedSlot<T, kRows, kDim, kWideningWarps, 2>;
    // The next of the loaded slots, into the next of a ring.
    template <int kRows, int kDim, typename RingOfHalf>
    __device__ __forceinline__ Slot<kRows, kDim> widen(Quantised format, const RingOfHalf& ring) {
      ptx::mbarrier_wait(block.barrier(kSlotFree + ring.slot), ring.parity ^ 1);
      ptx::mbarrier_wait(block.barrier(kLoadFull + loads.slot), loads.parity);
      const Slot<kRows, kDim> slot{
          first, block.s_memory + load_offset(loads.slot),
          block.s_memory + kMemory.ring_offset + ring.slot * kWideSlotBytes};
      first = slot.next_first(first);
      slot.widen(format);
      return slot;
    }
    template <typename RingOfHalf>
    __device__ __forceinline__ void publish(RingOfHalf& ring) {
      ptx::async_proxy_fence();
      __syncwarp();
      if (is_first_lane()) {
        ptx::mbarrier_arrive(block.barrier(kLoadFree + loads.slot));
        ptx::mbarrier_arrive(block.barrier(kSlotFull + ring.slot));
      }
      loads.next();
      ring.next();
    }

    // before_last(): in front of the last slot's publication.
    template <typename BeforeLast>
    __device__ __forceinline__ void widen_keys(BeforeLast before_last) {
#pragma unroll 1
      for (int i = 0; i < kKSlots; ++i) {
        widen<kTileK, kStoredColumns>(block.stored.k.format, left);
        if (i + 1 == kKSlots) before_last();
        publish(left);
      }
    }

    __device__ __forceinline__ void widen_values(int32_t key, bool is_clean, uint32_t number) {
#pragma unroll 1
      for (int i = 0; i < kVSlots; ++i) {
        widen_value_slot(left, 0, key + i * kVRows, is_clean, number);
        widen_value_slot(right, 1, key + i * kVRows, is_clean, number);
      }
    }
    template <typename RingOfHalf>
    __device__ __forceinline__ void widen_value_slot(RingOfHalf& ring, int half, int32_t key,
                                                     bool is_clean, uint32_t number) {
      const auto slot = widen<kVRows, kHalf>(block.stored.v.format, ring);
      // Before the slot is full, so that whoever has waited for it knows.
      if (!is_clean && slot.clean(this->present_keys(), key)) {
        block.dropped(number, half) = number + 1;
      }
      publish(ring);
    }
  };
};

}  // namespace wh::cuda
