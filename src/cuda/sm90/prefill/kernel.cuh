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
// Codes: warps beside the producer, three or seven, widen tiles of 8 bits, which TMA brings into
// slots of their own, into those that consumers read, of f16, and clean V; bf16 queries become f16
// too, times a power of two for each row. Scales that all keys of a head share are folded into the
// exponent (K) and into the stored rows (V); those of tokens are multiplied into scores, and into
// weights before they are rounded.
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
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/common/code_scales.cuh"
#include "cuda/sm90/common/key_boxes.cuh"
#include "cuda/sm90/common/products.cuh"
#include "cuda/sm90/common/query_rows.cuh"
#include "cuda/sm90/common/ring.cuh"
#include "cuda/sm90/common/tile_softmax.cuh"
#include "cuda/sm90/common/tile_walk.cuh"
#include "cuda/sm90/common/widen.cuh"
#include "cuda/sm90/prefill/kernel.h"
#include "cuda/sm90/prefill/tiles.h"

namespace wh::cuda {

template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores, Layouts kLayouts, Stored kStored>
struct PrefillBlock {
  using T = Element<kDtype>;
  static constexpr HeadDims kDims{kDimQk, kDimV};
  static constexpr bool kWidens = kStored == Stored::kCodes;
  static constexpr PrefillTile kTile = prefill_tile(kDims, kScores, kLayouts, kStored);
  static constexpr PrefillMemory kMemory{kDims, kTile};
  static constexpr int kTileQ = kTile.tile_q();
  static constexpr int kTileK = kTile.tile_k;
  static constexpr int kStages = kTile.stages;
  static constexpr int kLoadSlots = kTile.load_slots;
  static constexpr int kWarpgroups = kTile.warpgroups;
  static constexpr int kCleaners = 96;  // threads
  // Whether the consumers issue their products in turn, so that one is at softmax while another has
  // the tensor cores. Gains 3 % with three of them; two do so by themselves, and turns cost them up
  // to 1.5 % (dims 128 to 256).
  static constexpr bool kTakesTurns = kWarpgroups > 2;
  static constexpr bool kIsMasked = kScores == Scores::kMasked;
  // Of codes the products are of f16 whatever the type of q: f16 holds all codes, and a warp widens
  // them to it in a quarter of the instructions that bf16 takes (e4m3). bf16 queries are scaled on
  // their way (convert_queries()), which scores that are transformed would have to know. Weights by
  // scales of tokens need the range of bf16, and so do the values beside them.
  static constexpr bool kConvertsQueries =
      kWidens && kScores == Scores::kPlain && !std::is_same_v<T, __half>;
  using Key = std::conditional_t<kConvertsQueries, __half, T>;
  using Value = std::conditional_t<kWidens, __half, T>;
  // Weights of f16 are counted times 2^7, to 2^15 at most: below 2^-25 f16 drops them, and those of
  // a million keys beside a heavy one may be a thirtieth of a row.
  static constexpr int kLift = kWidens ? 7 : 0;
  template <typename V>
  static constexpr int kLiftOf = std::is_same_v<V, Value> ? kLift : 0;
  // Of a panel that TMA brings.
  static constexpr int kStoredColumns = kWidens ? 2 * kPanelColumns : kPanelColumns;
  static constexpr int kStoredPanelsQk = (kDimQk + kStoredColumns - 1) / kStoredColumns;
  static constexpr int kStoredPanelsV = (kDimV + kStoredColumns - 1) / kStoredColumns;
  static_assert(kMemory.bytes <= most_shared_bytes() && (!kWidens || kLoadSlots >= 2));

  // Barriers, 8 bytes each. Widened tiles of K and V lie in one ring.
  enum Barrier {
    kQFull,
    kQFree,
    kKFull,
    kKFree = kKFull + kStages,
    kVFull = kWidens ? kKFull : kKFree + kStages,  // and clean
    kVFree = kVFull + kStages,
    kVLoaded = kVFree + kStages,  // but not yet cleaned
    kElementBarriers = kVLoaded + kStages,
    // Of codes.
    kLoadsFull = kKFree + kStages,
    kLoadsFree = kLoadsFull + kLoadSlots,
    kTileTold = kLoadsFree + kLoadSlots,  // to those who widen, ahead of the consumers
    kTileHeard,
    kCodeBarriers,
    kBarriers = kWidens ? kCodeBarriers : kElementBarriers,
  };

  // Named barriers; 0 is __syncthreads().
  static constexpr int kCleanersBarrier = 1;
  static constexpr int kTurnBarrier = 2;     // one a consumer
  static constexpr int kQueriesBarrier = 5;  // the same

  // What a warp that widens need not keep in registers of where it is.
  struct WidenerNotes {
    // Scales of the sequence's first key, where keys are in pages those of the first page's.
    const float *first_k, *first_v;
    int32_t batch_idx;
    int32_t present_begin, present_end;
  };

  // Words that the producer warpgroup hands to the consumers.
  struct Mailbox {
    int32_t tile;  // index in the order; negative: no more
    // By the parity of a tile's number: the number + 1 of the last such tile in which cleaning lost
    // something. Nobody resets it: tiles without keys to wait for would read a flag that is just
    // being cleared. Those who widen may be two tiles ahead of the last consumer.
    uint32_t dropped[kWidens ? 4 : 2];
    int32_t widened_tile;  // of codes
    WidenerNotes widener_notes[kWidens ? kTile.widening_warps() : 1];
    ProducerNotes notes;
  };
  static_assert(kBarriers * 8 + sizeof(Mailbox) <= kMemory.bytes - kMemory.barrier_offset);

  const PrefillMaps& maps;
  const AttentionArgs& args;
  const TileOrder& order;
  unsigned char* s_memory;
  uint32_t s_q;                 // the same in the shared window, where Q comes first
  const StoredTensors* stored;  // of codes

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
    ptx::mbarrier_init(barrier(kQFree), 4 * kWarpgroups + (kWidens ? 0 : 1));
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(barrier(kKFull + i), kWidens ? kTile.widening_warps() : 1);
      ptx::mbarrier_init(barrier(kKFree + i), 4 * kWarpgroups);
      if constexpr (kWidens) continue;
      ptx::mbarrier_init(barrier(kVFull + i), 1);
      ptx::mbarrier_init(barrier(kVLoaded + i), 1);
      ptx::mbarrier_init(barrier(kVFree + i), 4 * kWarpgroups);
    }
    if constexpr (kWidens) {
      for (int i = 0; i < kLoadSlots; ++i) {
        ptx::mbarrier_init(barrier(kLoadsFull + i), 1);
        ptx::mbarrier_init(barrier(kLoadsFree + i), kTile.widening_warps());
      }
      ptx::mbarrier_init(barrier(kTileTold), 1);
      ptx::mbarrier_init(barrier(kTileHeard), kTile.widening_warps());
    }
    ptx::mbarrier_init_fence();
    for (volatile uint32_t& dropped : mailbox()->dropped) dropped = 0;
  }
  // What cleaning tells consumers of a tile by its number.
  __device__ __forceinline__ volatile uint32_t& dropped(uint32_t number) const {
    return mailbox()->dropped[number % (kWidens ? 4 : 2)];
  }

  // A tile's place in the problem and the keys it works on.
  using Work = WalkedTile<kLayouts>;
  __device__ __forceinline__ Work work(int32_t index) const {
    return walked_tile<kLayouts>(args, order, index, kTileK);
  }

  // --- producer: one thread, of pages and packed tensors one warp ---

  using Boxes = KeyBoxes<kLayouts>;
  using BoxPlace = typename Boxes::Place;
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
        load_queries(w, head_kv);
        note_keys(notes, w.keys);
      }
      Producer::meet();
      const Boxes boxes(args, maps.box_keys_log2, w.sequence);
      BoxPlace place = boxes.find((w.keys.end - 1) * kTileK);
#pragma unroll 1
      for (int32_t n = w.keys.end - 1; n >= notes.begin; --n) {
        const TileAt at{n * kTileK, head_kv, place};
        const BoxPlace ahead = boxes.find((n - 1) * kTileK);
        load<kMemory.panels_qk>(maps.k, boxes, at, s_k(ring.slot), ring.parity,
                                barrier(kKFree + ring.slot), barrier(kKFull + ring.slot));
        const int full = is_clean(notes, n) ? kVFull : kVLoaded;
        load<kMemory.panels_v>(maps.v, boxes, at, s_v(ring.slot), ring.parity,
                               barrier(kVFree + ring.slot), barrier(full + ring.slot));
        place = ahead;
        ring.next();
      }
      Producer::meet();
      if (Producer::is_leader()) {
        notes.tile = filled_tile<kLayouts>(args, order, gridDim.x,
                                           next_query_tile(order, gridDim.x, notes.tile), kTileK);
      }
    }
  }

  __device__ __forceinline__ void load_queries(const Work& w, int32_t head_kv) const {
    ptx::mbarrier_expect(barrier(kQFull),
                         kMemory.panels_qk * panel_bytes(order.packed_heads * order.tile_queries));
#pragma unroll
    for (int i = 0; i < kMemory.panels_qk; ++i) {
      ptx::tma_load_5d(s_q + i * panel_bytes(kTileQ), &maps.q, barrier(kQFull), i * kPanelColumns,
                       w.at.first_head - head_kv * args.group,
                       w.sequence.first_query + w.at.first_query, head_kv, w.sequence.query_batch,
                       ptx::CacheHint::kEvictFirst);
    }
  }

  struct TileAt {
    int32_t key, head_kv;
    BoxPlace place;
  };
  template <int kPanels>
  __device__ __forceinline__ void load(const CUtensorMap& map, const Boxes& boxes, const TileAt& at,
                                       uint32_t to, uint32_t parity, uint32_t free,
                                       uint32_t full) const {
    ptx::mbarrier_wait(free, parity ^ 1);
    const int32_t rows = boxes.template count<kTileK>(at.key);
    Producer::meet();
    if (Producer::is_leader()) ptx::mbarrier_expect(full, kPanels * panel_bytes(rows));
    boxes.template copy_rows<kTileK>(
        at.place, at.key, 0, [&](int32_t row, int32_t token, int32_t batch_idx) {
#pragma unroll 1
          for (int i = 0; i < kPanels; ++i) {
            ptx::tma_load_4d(to + i * panel_bytes(kTileK) + panel_bytes(row), &map, full,
                             i * kStoredColumns, token, at.head_kv, batch_idx,
                             ptx::CacheHint::kEvictLast);
          }
        });
  }

  // Of codes: tiles in the order in which they are read. The first keys are asked for while the
  // consumers still have the Q of the tile before, and are widened by the time that Q is there.
  __device__ __forceinline__ void produce_codes() const {
    Ring<kLoadSlots> ring;
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
        ptx::mbarrier_wait(barrier(kTileHeard), notes.q_parity);
        mailbox()->widened_tile = is_last ? -1 : index;
        ptx::mbarrier_arrive(barrier(kTileTold));
        if (is_last) {
          ptx::mbarrier_wait(barrier(kQFree), notes.q_parity);
          mailbox()->tile = -1;
          ptx::mbarrier_arrive(barrier(kQFull));
        }
      }
      if (is_last) return;
      const Work w = work(index);
      const int32_t head_kv = w.at.first_head / args.group;
      const Boxes boxes(args, maps.box_keys_log2, w.sequence);
      if (Producer::is_leader()) note_keys(notes, w.keys);
      Producer::meet();
      int32_t n = w.keys.end - 1;
      BoxPlace place = boxes.find(n * kTileK), next = boxes.find((n - 1) * kTileK);
      if (n >= notes.begin) {
        load_codes<kStoredPanelsQk>(maps.k, boxes, {n * kTileK, head_kv, place}, ring);
      }
      if (Producer::is_leader()) {
        ptx::mbarrier_wait(barrier(kQFree), notes.q_parity);
        notes.q_parity = notes.q_parity ^ 1;
        mailbox()->tile = index;
        load_queries(work(index), head_kv);
      }
      Producer::meet();
#pragma unroll 1
      for (; n >= notes.begin; --n) {
        const BoxPlace ahead = boxes.find((n - 2) * kTileK);
        if (n > notes.begin) {
          load_codes<kStoredPanelsQk>(maps.k, boxes, {(n - 1) * kTileK, head_kv, next}, ring);
        }
        load_codes<kStoredPanelsV>(maps.v, boxes, {n * kTileK, head_kv, place}, ring);
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
  template <int kPanels>
  __device__ __forceinline__ void load_codes(const CUtensorMap& map, const Boxes& boxes,
                                             const TileAt& at, Ring<kLoadSlots>& ring) const {
    load<kPanels>(map, boxes, at, s_q + kMemory.load_offset + ring.slot * kMemory.load_bytes,
                  ring.parity, barrier(kLoadsFree + ring.slot), barrier(kLoadsFull + ring.slot));
    ring.next();
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
          const bool has_dropped = clean_values<T, kMemory.panels_v, kTileK, kCleaners>(
              s_memory + kMemory.v_offset + ring.slot * kMemory.v_bytes, w.sequence.present,
              n * kTileK, threadIdx.x - 32);
          // Before the stage is full: the consumers have waited for all of them when they look.
          if (has_dropped) dropped(number) = number + 1;
          ptx::async_proxy_fence();
          ptx::named_sync(kCleanersBarrier, kCleaners);
          if (is_first) ptx::mbarrier_arrive(barrier(kVFull + ring.slot));
        }
        ring.next();
      }
    }
  }

  // --- of codes, the warps beside the producer's widen, three or seven ---

  __device__ __forceinline__ static int scale_offset(uint32_t key_tile, bool is_v) {
    const uint32_t slot = key_tile % kCodeScaleSlots;
    return kMemory.scales_offset + (2 * slot + (is_v ? 1 : 0)) * kMemory.scale_bytes;
  }

  struct Widener {
    const PrefillBlock& block;
    // Counted, and not as rings: registers are few here.
    uint32_t tiles;      // widened, of K and V
    uint32_t key_tiles;  // whose scales were asked for
    int first;           // group of rows of this warp of the next tile (WidenedTile)

    template <typename Wide, int kDim>
    using Tile = WidenedTile<Wide, kTileK, kDim, kTile.widening_warps()>;

    __device__ __forceinline__ explicit Widener(const PrefillBlock& block)
        : block(block), tiles(0), key_tiles(0), first(threadIdx.x / 32 - 1) {}

    __device__ __forceinline__ static bool is_first_lane() { return threadIdx.x % 32 == 0; }
    __device__ __forceinline__ int load_slot() const { return tiles % kLoadSlots; }
    __device__ __forceinline__ int slot() const { return tiles % kStages; }

    __device__ __forceinline__ void run() {
      for (uint32_t number = 0;; ++number) {
        ptx::mbarrier_wait(block.barrier(kTileTold), number % 2);
        const int32_t index = block.mailbox()->widened_tile;
        __syncwarp();
        if (is_first_lane()) ptx::mbarrier_arrive(block.barrier(kTileHeard));
        if (index < 0) return;
        const Work w = block.work(index);
        if (w.keys.end <= w.keys.begin) continue;
        note(w);
        const bool scales_k = multiplies_scores<kScores>(block.args, block.stored->k, w);
        const bool scales_v = has_token_scales(block.stored->v);
        // A step: the scales of one tile of keys are asked for, K of the one before it and V of the
        // one before that are widened. The slot that these scales take is that of four tiles ago,
        // which whoever gave K's slot back is done with.
#pragma unroll 1
        for (int32_t n = w.keys.end - 1; n + 2 >= w.keys.begin; --n) {
          const bool has_k = n + 1 >= w.keys.begin && n + 1 < w.keys.end;
          if (has_k) wait();
          const uint32_t ready = key_tiles - 1;
          if (n >= w.keys.begin) {
            request_scales(n, scales_k, scales_v);
            ptx::cp_async_commit();
            ++key_tiles;
          }
          if (has_k) {
            await_scales(n >= w.keys.begin);
            if (scales_v && !w.keys.is_clean(n + 1) && clean_scales(ready)) {
              block.dropped(number) = number + 1;
            }
            next_tile<Key, kDimQk>().widen(block.stored->k.format);
            publish();
          }
          if (n + 2 < w.keys.end) {
            wait();
            const bool is_clean = w.keys.is_clean(n + 2);
            const bool has_dropped =
                scales_v ? widen_values<T>(n + 2, is_clean) : widen_values<Value>(n + 2, is_clean);
            if (has_dropped) block.dropped(number) = number + 1;
            publish();
          }
        }
      }
    }

    // Returns what WidenedTile::clean() does.
    template <typename Wide>
    __device__ __forceinline__ bool widen_values(int32_t n, bool is_clean) {
      const auto tile = next_tile<Wide, kDimV>();
      tile.widen(block.stored->v.format);
      return !is_clean && tile.clean(present_keys(), n * kTileK);
    }

    __device__ __forceinline__ volatile WidenerNotes& notes() const {
      return block.mailbox()->widener_notes[threadIdx.x / 32 - 1];
    }
    __device__ __forceinline__ const float* first_scale(const Work& w, const KvTensor& of) const {
      const int32_t head_kv = w.at.first_head / block.args.group;
      const bool is_paged = w.key_rows(block.args).pages != nullptr && has_token_scales(of);
      return of.scales_data +
             of.scale_offset({is_paged ? 0 : w.sequence.key_batch, head_kv,
                              is_paged ? 0 : w.sequence.first_key, w.sequence.batch_idx});
    }
    __device__ __forceinline__ void note(const Work& w) const {
      __syncwarp();
      if (is_first_lane()) {
        volatile WidenerNotes& to = notes();
        to.first_k = first_scale(w, block.stored->k);
        to.first_v = first_scale(w, block.stored->v);
        to.batch_idx = w.sequence.batch_idx;
        to.present_begin = w.sequence.present.begin;
        to.present_end = w.sequence.present.end;
      }
      __syncwarp();
    }
    __device__ __forceinline__ Keys present_keys() const {
      return {notes().present_begin, notes().present_end};
    }

    // Those of the tile before the one that was asked for last, or of that one.
    __device__ __forceinline__ static void await_scales(bool has_asked_again) {
      if (has_asked_again) {
        ptx::cp_async_wait<1>();
      } else {
        ptx::cp_async_wait<0>();
      }
    }
    // The scales of a tile of keys come while the tile before is widened, one a thread of K and of
    // V. Those of keys that do not exist are not read, and are 0.
    static_assert(kTileK <= 32 * kTile.widening_warps() || !kWidens);
    __device__ __forceinline__ void request_scales(int32_t n, bool of_k, bool of_v) const {
      const int i = threadIdx.x - 32;
      if (i >= kTileK) return;
      const int32_t key = n * kTileK + i;
      const Keys present = present_keys();
      const bool exists = key >= present.begin && key < present.end;
      if (of_k) {
        const float* from = scale_address(block.stored->k, notes().first_k, key, exists);
        ptx::cp_async<4>(block.s_q + scale_offset(key_tiles, false) + 4 * i, from, exists ? 4 : 0);
      }
      if (of_v) {
        const float* from = scale_address(block.stored->v, notes().first_v, key, exists);
        ptx::cp_async<4>(block.s_q + scale_offset(key_tiles, true) + 4 * i, from, exists ? 4 : 0);
      }
    }
    // From that of the first key, which others than those of tokens are.
    __device__ __forceinline__ const float* scale_address(const KvTensor& of, const float* first,
                                                          int32_t key, bool exists) const {
      if (!exists || !has_token_scales(of)) return first;
      Work w{};
      w.sequence.batch_idx = notes().batch_idx;
      const KeyRows rows = w.key_rows(block.args);
      if (rows.pages == nullptr) return first + key * of.stride_scales[2];
      return first + rows.offset(of.stride_scales[0], of.stride_scales[2], key);
    }
    // A weight of 0 does not hide a scale that is no number, either.
    __device__ __forceinline__ bool clean_scales(uint32_t key_tile) const {
      auto* of_v = reinterpret_cast<float*>(block.s_memory + scale_offset(key_tile, true));
      bool has_dropped = false;
#pragma unroll 1
      for (int i = threadIdx.x - 32; i < kTileK; i += 32 * kTile.widening_warps()) {
        if (fabsf(of_v[i]) < INFINITY) continue;
        of_v[i] = 0;
        has_dropped = true;
      }
      return has_dropped;
    }

    __device__ __forceinline__ void wait() const {
      ptx::mbarrier_wait(block.barrier(kKFree + slot()), tiles / kStages % 2 ^ 1);
      ptx::mbarrier_wait(block.barrier(kLoadsFull + load_slot()), tiles / kLoadSlots % 2);
    }
    template <typename Wide, int kDim>
    __device__ __forceinline__ Tile<Wide, kDim> next_tile() {
      const Tile<Wide, kDim> tile{
          first, block.s_memory + kMemory.load_offset + load_slot() * kMemory.load_bytes,
          block.s_memory + kMemory.k_offset + slot() * kMemory.k_bytes};
      first = tile.next_first(first);
      return tile;
    }
    __device__ __forceinline__ void publish() {
      ptx::async_proxy_fence();
      __syncwarp();
      if (is_first_lane()) {
        ptx::mbarrier_arrive(block.barrier(kLoadsFree + load_slot()));
        ptx::mbarrier_arrive(block.barrier(kKFull + slot()));
      }
      ++tiles;
    }
  };

  // --- consumers: a warpgroup has 64 rows ---

  struct Consumer {
    const PrefillBlock& block;
    int warpgroup;
    Ring<kStages> ring;
    TileSoftmax<T> softmax;
    float r_o[kDimV / 2];      // [64 rows, kDimV] of the warpgroup, unnormalised
    uint32_t r_p[kTileK / 4];  // [64 rows, kTileK], rounded to T
    // Of codes, in one register, there is no other: in the last byte the key tiles that were
    // multiplied; whether scores are to be multiplied by scales of the keys, and by powers of this
    // thread's two rows, whose exponents (convert_queries()) are the bytes between.
    uint32_t key_tiles;
    static constexpr uint32_t kScalesKeys = 1, kScalesRows = 2, kOneKeyTile = 1u << 24;

    __device__ __forceinline__ Consumer(const PrefillBlock& block, int warpgroup)
        : block(block), warpgroup(warpgroup), softmax(block.args, kScores) {
      if constexpr (kWidens) key_tiles = 0;
    }

    __device__ __forceinline__ bool is_first_lane() const { return threadIdx.x % 32 == 0; }

    // Who has the first turn waits for K and V for all: whoever is given the turn after it knows
    // that they are there.
    __device__ __forceinline__ bool waits() const { return !kTakesTurns || warpgroup == 0; }
    // Where a tile is in its ring: K and V of the same keys in the same slot of two, or one after
    // another in one.
    __device__ __forceinline__ void wait_keys(int stage, uint32_t parity) const {
      ptx::mbarrier_wait(block.barrier(kKFull + stage), parity);
    }
    __device__ __forceinline__ void wait_values(int stage, uint32_t parity) const {
      ptx::mbarrier_wait(block.barrier(kVFull + stage), parity);
    }

    __device__ __forceinline__ void begin_scores(float (&s)[kTileK / 2], int stage) {
      const uint64_t q = ptx::panel_descriptor(block.s_q + panel_bytes(warpgroup * 64));
      const uint64_t k = ptx::panel_descriptor(block.s_k(stage));
      ptx::keep(s);
      issue_scores<Key, kTileK, kTileQ, kDimQk / kStepColumns>(s, q, k);
    }
    template <typename V>
    __device__ __forceinline__ void begin_values(int stage) {
      const uint64_t v = ptx::panel_descriptor(block.s_v(stage), panel_bytes(kTileK));
      ptx::keep(r_o);
      ptx::keep(r_p);
      issue_values<V, kDimV, kTileK / kStepColumns>(r_o, r_p, v);
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

    template <typename V>
    __device__ __forceinline__ void first_tile(int32_t tile) {
      float s[kTileK / 2];
      const int k_stage = ring.slot;
      wait_keys(k_stage, ring.parity);
      begin_scores(s, k_stage);
      ptx::wgmma_wait<0>();
      ptx::keep(s);
      release(kKFree + k_stage);
      if constexpr (kWidens) ring.next();
      scale_scores(s);
      softmax.raise(s, tile * kTileK, true);
      softmax.template weigh<kLiftOf<V>>(s);
      scale_weights<V>(s);
      TileSoftmax<V>::pack(s, r_p);
    }

    // Scores of `tile` beside the values of the tile before.
    template <bool kHides, typename V>
    __device__ __forceinline__ void next_tile(int32_t tile) {
      const int first_stage = ring.slot;
      const uint32_t first_parity = ring.parity;
      ring.next();
      const int second_stage = ring.slot;
      const uint32_t second_parity = ring.parity;
      if constexpr (kWidens) ring.next();
      const int k_stage = kWidens ? first_stage : second_stage;
      const int v_stage = kWidens ? second_stage : first_stage;
      const uint32_t k_parity = kWidens ? first_parity : second_parity;
      const uint32_t v_parity = kWidens ? second_parity : first_parity;
      float s[kTileK / 2];
      if (waits()) wait_keys(k_stage, k_parity);
      take_turn();
      begin_scores(s, k_stage);
      softmax.correct(r_o);
      if (waits()) wait_values(v_stage, v_parity);
      begin_values<V>(v_stage);
      pass_turn_to((warpgroup + 1) % kWarpgroups);
      ptx::wgmma_wait<1>();
      ptx::keep(s);
      release(kKFree + k_stage);
      // The addresses of an array mask need the registers of the weights under way.
      if constexpr (kIsMasked) finish_values(v_stage);
      scale_scores(s);
      softmax.raise(s, tile * kTileK, kHides);
      // Here, and not behind the exponentials: the other warpgroup's products fill the gap. One
      // row's exponentials in front of the wait gave nothing at dim 128 and cost 1 to 5 %
      // elsewhere.
      if constexpr (!kIsMasked) finish_values(v_stage);
      softmax.template weigh<kLiftOf<V>>(s);
      scale_weights<V>(s);
      TileSoftmax<V>::pack(s, r_p);
    }

    // Scores, and weights, of codes by the scales of the keys.
    __device__ __forceinline__ void scale_scores(float (&s)[kTileK / 2]) const {
      if constexpr (!kWidens) return;
      if (key_tiles & (kScalesKeys | kScalesRows)) {
        if (kConvertsQueries && (key_tiles & kScalesRows)) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float power = power_below(key_tiles >> (8 + 8 * r) & 0xff);
#pragma unroll
            for (int i = 0; i < kTileK / 4; ++i) s[4 * (i / 2) + 2 * r + i % 2] *= power;
          }
        }
        if (key_tiles & kScalesKeys) multiply_by_scales(s, scales(false));
      }
    }
    template <typename V>
    __device__ __forceinline__ void scale_weights(float (&s)[kTileK / 2]) {
      if constexpr (!kWidens) return;
      if constexpr (!std::is_same_v<V, Value>) multiply_by_scales(s, scales(true));
      key_tiles += kOneKeyTile;
    }
    __device__ __forceinline__ const void* scales(bool is_v) const {
      return block.s_memory + scale_offset(key_tiles / kOneKeyTile, is_v);
    }
    __device__ __forceinline__ void note_key_scale(const Work& w) {
      softmax.scale_log2 = scale_log2_of<kScores>(block.args);
      key_tiles &= ~(kOneKeyTile - 1);
      if (multiplies_scores<kScores>(block.args, block.stored->k, w)) {
        key_tiles |= kScalesKeys;
      } else if constexpr (kScores == Scores::kPlain) {
        softmax.scale_log2 *= block.stored->k.scale(head_of(block.args, w), 0);
      }
    }
    // bf16 queries become f16, in place, each warp those of its own rows: times a power of two that
    // brings the largest of a row to [2^15, 2^16). Where all rows of the warp may share one, the
    // exponent's scale takes it out again, else scores are multiplied (scale_scores()): a tiny row
    // beside a huge one would be left with no bits. f16 rounds what is below 2^-32 of the largest
    // of its row, by at most 2^-40 of that; where rows share a power, below 2^-24, by 2^-32.
    // Rows that are 0 or were not loaded do not count, nor do NaN and infinity, which stay what
    // they are.
    __device__ __forceinline__ void convert_queries() {
      const int lane = threadIdx.x % 32;
      const int first_row = warpgroup * 64 + threadIdx.x % 128 / 32 * 16;
      const int loaded = block.order.packed_heads * block.order.tile_queries;
      // Of rows lane / 8 + 4 i.
      unsigned char* from = block.s_memory + panel_bytes(first_row) + lane * 16;
      const auto chunk = [&](int panel, int i) {
        return reinterpret_cast<uint4*>(from + panel * panel_bytes(kTileQ) + i * panel_bytes(4));
      };
      uint32_t tops[4] = {};
#pragma unroll 1
      for (int panel = 0; panel < kMemory.panels_qk; ++panel) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint4 of = *chunk(panel, i);
          const uint32_t more = ptx::max_pairs(
              ptx::max_pairs(ptx::finite_magnitudes(of.x), ptx::finite_magnitudes(of.y)),
              ptx::max_pairs(ptx::finite_magnitudes(of.z), ptx::finite_magnitudes(of.w)));
          tops[i] = ptx::max_pairs(tops[i], more);
        }
      }
      // Exponents of the largest as f32 has them. Below 16 the power would leave bf16, and what is
      // so small has few bits.
      uint32_t exponents[4], most = 0, least = ~0u;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t top = max(tops[i] & 0x7fff, tops[i] >> 16 & 0x7fff);
        if (first_row + lane / 8 + 4 * i >= loaded) top = 0;
#pragma unroll
        for (int step = 1; step < 8; step *= 2) top = max(top, __shfl_xor_sync(~0u, top, step));
        exponents[i] = max(top >> 7, 16u);
        if (top == 0) continue;
        most = max(most, exponents[i]);
        least = min(least, exponents[i]);
      }
      most = __reduce_max_sync(~0u, most);
      least = __reduce_min_sync(~0u, least);
      if (most == 0) most = least = 127;
      const float shared_scale = softmax.scale_log2 * power_below(most);
      if (most - least <= 8 && shared_scale >= 0x1p-126f && shared_scale < INFINITY) {
        softmax.scale_log2 = shared_scale;
#pragma unroll
        for (uint32_t& exponent : exponents) exponent = most;
      } else {
        uint32_t of_rows[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          of_rows[i] = __shfl_sync(~0u, exponents[i], lane / 4 % 4 * 8);
        }
        const bool is_upper = lane >= 16;
        key_tiles |= kScalesRows | (is_upper ? of_rows[1] : of_rows[0]) << 8 |
                     (is_upper ? of_rows[3] : of_rows[2]) << 16;
      }
#pragma unroll 1
      for (int panel = 0; panel < kMemory.panels_qk; ++panel) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t factor = (kQueryExponents - exponents[i]) * 0x00800080u;
          const auto convert = [&](uint32_t pair) {
            pair = ptx::multiply_pairs(pair, factor);
            return ptx::pack<__half>(__uint_as_float(pair << 16),
                                     __uint_as_float(pair & 0xffff0000u));
          };
          const uint4 of = *chunk(panel, i);
          *chunk(panel, i) = make_uint4(convert(of.x), convert(of.y), convert(of.z), convert(of.w));
        }
      }
      ptx::async_proxy_fence();
      ptx::named_sync(kQueriesBarrier + warpgroup, 128);
    }
    // Of a number of that exponent and the factor that brings it to [2^15, 2^16), as f32 has them.
    static constexpr uint32_t kQueryExponents = 127 + 127 + 15;
    // What such a factor took out of a row: one over it.
    static __device__ __forceinline__ float power_below(uint32_t exponent) {
      return __uint_as_float((exponent - 15) << 23);
    }
    // The sums, normalised first, by the scales of V that all keys share.
    __device__ __forceinline__ void scale_sums(const float (&norm)[2], const KvPlace& head) {
      const KvTensor& v = block.stored->v;
      if (v.scales != Scales::kChannel) {
        const float scale = v.scale(head, 0);
#pragma unroll
        for (int i = 0; i < kDimV / 2; ++i) r_o[i] = r_o[i] * norm[i / 2 % 2] * scale;
        return;
      }
      const float* of_head = v.scales_data + v.scale_offset(head);
#pragma unroll
      for (int i = 0; i < kDimV / 2; i += 4) {
        int column = 2 * i + threadIdx.x % 4 * 2;
        // Opaque, as the sums below: they are multiplied before more scales are loaded, there are
        // no registers for all of them.
        asm volatile("" : "+r"(column));
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float scale =
              column + e < block.args.dim_v ? of_head[(column + e) * v.stride_scales[3]] : 1;
          r_o[i + e] = r_o[i + e] * norm[0] * scale;
          r_o[i + 2 + e] = r_o[i + 2 + e] * norm[1] * scale;
        }
        ptx::keep(reinterpret_cast<float(&)[4]>(r_o[i]));
      }
    }

    __device__ __forceinline__ void finish_values(int stage) {
      ptx::wgmma_wait<0>();
      ptx::keep(r_o);
      release(kVFree + stage);
    }

    template <typename V>
    __device__ __forceinline__ void last_values() {
      softmax.correct(r_o);
      wait_values(ring.slot, ring.parity);
      begin_values<V>(ring.slot);
      finish_values(ring.slot);
      softmax.template lower<kLiftOf<V>>();
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
      if constexpr (kWidens) note_key_scale(w);
      return w.keys;
    }

    // Of this thread. Of codes opaque, as the tile is (walked_tile): two registers.
    __device__ __forceinline__ int32_t stored_row(int r) const {
      int32_t row = warpgroup * 64 + accumulator_row(r);
      if constexpr (kWidens) asm volatile("" : "+r"(row));
      return row;
    }
    __device__ __forceinline__ void store(const QueryRows<T, Work>& query_rows) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const auto place = query_rows.place(stored_row(r));
        query_rows.store_log_sum_exp(place, softmax.finish(r, query_rows.sink(place)));
        if constexpr (!kWidens) query_rows.store(r_o, r, place, softmax.norm(r), 0);
      }
      if constexpr (kWidens) {
        const float lowers = multiplies_weights() ? 1 : 1.0f / (1 << kLift);
        float norm[2] = {softmax.norm(0) * lowers, softmax.norm(1) * lowers};
        const Scales scales_v = block.stored->v.scales;
        if (scales_v != Scales::kNone && scales_v != Scales::kTokenHead) {
          scale_sums(norm, head_of(block.args, query_rows.tile));
          for (float& factor : norm) factor = factor == 0 ? 0 : 1;
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const auto place = query_rows.place(stored_row(r));
          query_rows.store(r_o, r, place, norm[r], 0);
        }
      }
    }
    __device__ __forceinline__ void restore(const Work& w) const {
      if constexpr (kWidens) {
        const KeyRows rows = w.key_rows(block.args);
        const int32_t head_kv = w.at.first_head / block.args.group;
        query_rows(w).restore(kTileK, warpgroup * 64, softmax.online.correction, 0, kDimV,
                              [&](int32_t key, int32_t column) {
                                const auto at = rows.place(key);
                                return widened_code(
                                    block.stored->v,
                                    {at.batch_idx, head_kv, at.token_idx, w.sequence.batch_idx},
                                    column);
                              });
      } else {
        query_rows(w).restore(kTileK, warpgroup * 64, softmax.online.correction, 0, kDimV);
      }
    }

    // Scales of tokens: where q is of bf16 alone.
    __device__ __forceinline__ bool multiplies_weights() const {
      if constexpr (std::is_same_v<T, Value>) {
        return false;
      } else {
        return has_token_scales(block.stored->v);
      }
    }

    // Weights and values of type V.
    template <typename V>
    __device__ __forceinline__ void walk(const KeyTiles& keys) {
      int32_t n = keys.end - 1;
      first_tile<V>(n--);
      walk_keys<kIsMasked>(
          keys, n, [&](int32_t tile) { next_tile<true, V>(tile); },
          [&](int32_t tile) { next_tile<false, V>(tile); });
      __syncwarp();
      release(kQFree);
      last_values<V>();
    }

    __device__ __forceinline__ void run() {
      if (warpgroup == kWarpgroups - 1) pass_turn_to(0);
      for (uint32_t number = 0;; ++number) {
        ptx::mbarrier_wait(block.barrier(kQFull), number % 2);
        const int32_t index = block.mailbox()->tile;
        if (index < 0) return;
        const KeyTiles keys = enter(block.work(index));
        if constexpr (kConvertsQueries) {
          if (keys.end > keys.begin) convert_queries();
        }
        softmax.online = OnlineSoftmax{};
#pragma unroll
        for (int i = 0; i < kDimV / 2; ++i) r_o[i] = 0;
        if (keys.end > keys.begin) {
          if (multiplies_weights()) {
            walk<T>(keys);
          } else {
            walk<Value>(keys);
          }
        } else {
          __syncwarp();
          release(kQFree);
        }
        const Work w = block.work(index);
        store(query_rows(w));
        if (block.dropped(number) == number + 1) restore(w);
      }
    }
  };
};

template <typename Block>
__device__ __forceinline__ void run_block(const Block& block) {
  constexpr PrefillTile kTile = Block::kTile;
  if (threadIdx.x == 0) {
    block.init_barriers();
    ptx::tma_prefetch(&block.maps.q);
    ptx::tma_prefetch(&block.maps.k);
    ptx::tma_prefetch(&block.maps.v);
  }
  __syncthreads();
  // Shuffled, so that the compiler knows it to be the same for the warp: descriptors that depend on
  // it then stay in uniform registers (16 moves a tile less).
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (warpgroup < kTile.supply_warpgroups) {
    ptx::registers_give<kTile.producer_registers>();
    if (threadIdx.x < Block::Producer::kThreads) {
      if constexpr (Block::kWidens) {
        block.produce_codes();
      } else {
        block.produce();
      }
    } else if (threadIdx.x >= 32) {
      if constexpr (Block::kWidens) {
        typename Block::Widener(block).run();
      } else {
        block.clean();
      }
    }
  } else {
    ptx::registers_take<kTile.consumer_registers>();
    typename Block::Consumer consumer(block, warpgroup - kTile.supply_warpgroups);
    consumer.run();
  }
}

template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores, Layouts kLayouts>
__global__ void __launch_bounds__(prefill_tile({kDimQk, kDimV}, kScores, kLayouts).threads(), 1)
    sm90_prefill(const __grid_constant__ PrefillMaps maps,
                 const __grid_constant__ AttentionArgs args,
                 const __grid_constant__ TileOrder order) {
  extern __shared__ __align__(1024) unsigned char s_memory[];
  run_block(PrefillBlock<kDimQk, kDimV, kDtype, kScores, kLayouts, Stored::kElements>{
      maps, args, order, s_memory, ptx::shared_address(s_memory), nullptr});
}
template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores, Layouts kLayouts>
__global__ void __launch_bounds__(prefill_code_tile({kDimQk, kDimV}, kScores, kLayouts).threads(),
                                  1)
    sm90_prefill_codes(const __grid_constant__ PrefillMaps maps,
                       const __grid_constant__ AttentionArgs args,
                       const __grid_constant__ TileOrder order,
                       const __grid_constant__ StoredTensors stored) {
  extern __shared__ __align__(1024) unsigned char s_memory[];
  run_block(PrefillBlock<kDimQk, kDimV, kDtype, kScores, kLayouts, Stored::kCodes>{
      maps, args, order, s_memory, ptx::shared_address(s_memory), &stored});
}

template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores, Layouts kLayouts>
const void* prefill_instance() {
  return reinterpret_cast<const void*>(&sm90_prefill<kDimQk, kDimV, kDtype, kScores, kLayouts>);
}
template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores, Layouts kLayouts>
const void* prefill_code_instance() {
  return reinterpret_cast<const void*>(
      &sm90_prefill_codes<kDimQk, kDimV, kDtype, kScores, kLayouts>);
}

}  // namespace wh::cuda
