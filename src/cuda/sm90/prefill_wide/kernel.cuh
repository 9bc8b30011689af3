// sm90_prefill_wide: many queries, heads up to 576 wide with values up to 512, on Hopper.
//
// Schedule. A block owns 64 query rows; 64 x 512 sums are more than one warpgroup's registers, so
// two share them. The left one computes S = Q K^T, softmax and O[:, :256] += P V with P in
// registers, and hands P and the row factors over in shared memory; the right one computes
// O[:, 256:] += P V. No product is done twice. The left order is S(n), values of n + 1, softmax(n).
//
// Two blocks of a cluster work on the same keys for neighbouring rows or heads; each loads half of
// every K and V tile and multicasts it: 128 flops a byte out of L2, which 64 rows alone would not
// have. Copies go through two rings of 16 KB slots, one for each warpgroup, in the order in which
// it reads them: K as 64 keys x 128 columns, V as 32 keys x 256 columns. A slot is released as soon
// as the products that read it are done.
//
// Roofline: tensor cores, 4096 flops a clock and SM; but for 64 rows a tile of 64 keys also takes
// 2,750 clocks of the 128-byte port of shared memory against 2,048 of products (copies in 1,024,
// Q K^T 1,024, P V 580, P 128), so the bound is 74 % of the tensor rate.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/clean_values.cuh"
#include "cuda/common/key_range.h"
#include "cuda/common/online_softmax.cuh"
#include "cuda/common/scores.cuh"
#include "cuda/common/tensor_map.h"
#include "cuda/common/tile_order.h"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/prefill_wide/kernel.h"
#include "cuda/sm90/prefill_wide/tiles.h"
#include "cuda/sm90/query_rows.cuh"

namespace wh::cuda {

template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores>
struct WideBlock {
  using T = std::conditional_t<kDtype == Dtype::kF16, __half, __nv_bfloat16>;
  static constexpr HeadDims kDims{kDimQk, kDimV};
  static constexpr WideTile kTile = wide_tile(kDims, kScores);
  static constexpr WideMemory kMemory{kDims, kTile};
  static constexpr int kTileK = kTile.tile_k;
  static constexpr int kSlots = kTile.left_slots + kTile.right_slots;
  static constexpr int kHalf = 256;  // columns of V that a warpgroup owns
  static constexpr int kVRows = kWideValueRows;
  static constexpr int kPanelsOfKSlot = wide_panels_of_slot(kTile);
  static constexpr int kKSlotBytes = kPanelsOfKSlot * kTileK * 128;
  static constexpr int kKSlots = (kMemory.panels_qk + kPanelsOfKSlot - 1) / kPanelsOfKSlot;
  static constexpr int kVSlots = kTileK / kVRows;  // of one half
  static constexpr int kCleaners = 96;             // threads
  static constexpr uint16_t kBothBlocks = 3;
  static_assert(kDimV == 2 * kHalf && kMemory.bytes <= 232448);

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
    kWarpgroupBarrier,  // left and right
  };

  struct Mailbox {
    int32_t tile;  // index in the order; negative: no more
    // By the parity of a tile's number, and the half: the number + 1 of the last such tile in which
    // cleaning that half of V lost something. A half's warpgroup has waited for all of its own
    // slots when it looks, not for the other's. Nobody resets it: tiles without keys to wait for
    // would read a flag that is just being cleared.
    uint32_t dropped[2][2];
  };
  static_assert(kBarriers * 8 + sizeof(Mailbox) <= 512);

  // Which slot is next, and the parity of its barriers. A ring for each warpgroup: in a common one
  // a warpgroup that skips the other's slots could be two fills ahead of a barrier's parity.
  template <int kFirst, int kCount>
  struct RingOf {
    int slot = kFirst;
    uint32_t parity = 0;

    __device__ __forceinline__ static int after(int slot) {
      return slot + 1 == kFirst + kCount ? kFirst : slot + 1;
    }
    __device__ __forceinline__ void next() {
      slot = after(slot);
      if (slot == kFirst) parity ^= 1;
    }
  };
  using LeftRing = RingOf<0, kTile.left_slots>;
  using RightRing = RingOf<kTile.left_slots, kTile.right_slots>;

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

  struct Work {
    QueryTile at;  // of this block
    Keys present;
    KeyTiles keys;  // of the cluster
  };
  __device__ __forceinline__ int32_t block_queries() const {
    return order.tile_queries / kWideCluster;
  }
  __device__ __forceinline__ Work work(int32_t index) const {
    // Opaque: computing it again after the main loop is cheaper than ten registers through it.
    asm volatile("" : "+r"(index));
    Work w;
    w.at = query_tile(order, args.heads_q, index);
    w.present = present_keys(args, w.at.batch_idx);
    const int32_t last = min(args.len_q, w.at.first_query + order.tile_queries) - 1;
    w.keys = key_tiles(args, w.present, w.at.first_query, last, kTileK);
    w.at.first_query += rank * block_queries();
    return w;
  }

  // The tile with this number, for everybody but the producers.
  __device__ __forceinline__ int32_t read_tile(uint32_t number) const {
    ptx::mbarrier_wait(barrier(kTileFull), number % 2);
    return mailbox()->tile;
  }

  // --- producer: one thread ---

  __device__ __forceinline__ void produce() const {
    LeftRing left;
    RightRing right;
    const int32_t clusters = gridDim.x / kWideCluster;
    int32_t index = first_tile(order, blockIdx.x / kWideCluster);
    for (uint32_t number = 0;; ++number) {
      ptx::mbarrier_expect(barrier(kTileFull), sizeof(int32_t));
      if (rank == 0) {
        if (number > 0) {
          index = order.next == nullptr ? index + clusters
                                        : claimed_tile(order, clusters, atomicAdd(order.next, 1));
        }
        ptx::mbarrier_wait(barrier(kTileFree), (number + 1) % 2);
        const uint32_t word = s_q + kMemory.barrier_offset + kBarriers * 8;
        for (uint32_t block = 0; block < kWideCluster; ++block) {
          ptx::store_remote(word, barrier(kTileFull), block, index < order.end ? index : -1);
        }
      }
      index = read_tile(number);
      if (rank != 0) ptx::mbarrier_arrive_at(barrier(kTileFree), 0);
      if (index < 0) return;
      const Work w = work(index);
      const int32_t head_kv = w.at.first_head / args.group;
      ptx::mbarrier_wait(barrier(kQFree), (number + 1) % 2);
      ptx::mbarrier_expect(barrier(kQFull),
                           kMemory.panels_qk * order.packed_heads * block_queries() * 128);
#pragma unroll 1
      for (int i = 0; i < kMemory.panels_qk; ++i) {
        ptx::tma_load_5d(s_q + i * kWideTileQ * 128, &maps.q, barrier(kQFull), i * kPanelColumns,
                         w.at.first_head - head_kv * args.group, w.at.first_query, head_kv,
                         w.at.batch_idx, ptx::CacheHint::kEvictFirst);
      }
#pragma unroll 1
      for (int32_t n = w.keys.end - 1; n >= w.keys.begin; --n) {
        load_keys(left, n * kTileK, head_kv, w.at.batch_idx);
        if (n + 1 < w.keys.end) {
          load_values(left, right, (n + 1) * kTileK, head_kv, w.at.batch_idx,
                      w.keys.is_clean(n + 1));
        }
      }
      if (w.keys.end > w.keys.begin) {
        load_values(left, right, w.keys.begin * kTileK, head_kv, w.at.batch_idx,
                    w.keys.is_clean(w.keys.begin));
      }
    }
  }

  // A slot is two boxes: halves of the rows of one panel, or two panels. This block's is number
  // `rank`.
  __device__ __forceinline__ void load_keys(LeftRing& ring, int32_t key, int32_t head_kv,
                                            int32_t batch_idx) const {
#pragma unroll 1
    for (int i = 0; i < kKSlots; ++i) {
      ptx::mbarrier_wait(barrier(kSlotFree + ring.slot), ring.parity ^ 1);
      ptx::mbarrier_expect(barrier(kSlotFull + ring.slot), kKSlotBytes);
      const int panel = kPanelsOfKSlot == 1 ? i : 2 * i + rank;
      ptx::tma_multicast_4d(s_slot(ring.slot) + rank * (kKSlotBytes / 2), &maps.k,
                            barrier(kSlotFull + ring.slot), panel * kPanelColumns,
                            kPanelsOfKSlot == 1 ? key + rank * (kTileK / 2) : key, head_kv,
                            batch_idx, kBothBlocks);
      ring.next();
    }
  }

  __device__ __forceinline__ void load_values(LeftRing& left, RightRing& right, int32_t key,
                                              int32_t head_kv, int32_t batch_idx,
                                              bool is_clean) const {
#pragma unroll 1
    for (int i = 0; i < kVSlots; ++i) {
      load_value_slot(left, key + i * kVRows, 0, head_kv, batch_idx, is_clean);
      load_value_slot(right, key + i * kVRows, kHalf, head_kv, batch_idx, is_clean);
    }
  }

  // A slot is four panels of 32 rows; this block loads two.
  template <typename Ring>
  __device__ __forceinline__ void load_value_slot(Ring& ring, int32_t key, int32_t first_column,
                                                  int32_t head_kv, int32_t batch_idx,
                                                  bool is_clean) const {
    const uint32_t full = barrier((is_clean ? kSlotFull : kSlotLoaded) + ring.slot);
    ptx::mbarrier_wait(barrier(kSlotFree + ring.slot), ring.parity ^ 1);
    ptx::mbarrier_expect(full, kWideSlotBytes);
#pragma unroll 1
    for (uint32_t panel = 2 * rank; panel < 2 * rank + 2; ++panel) {
      ptx::tma_multicast_4d(s_slot(ring.slot) + panel * kVRows * 128, &maps.v, full,
                            first_column + panel * kPanelColumns, key, head_kv, batch_idx,
                            kBothBlocks);
    }
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
      if (is_first) ptx::mbarrier_arrive_at(barrier(kTileFree), 0);
      if (index < 0) return;
      const Work w = work(index);
      const auto clean_slot = [&](int slot, int half, int32_t key) {
        ptx::mbarrier_wait(barrier(kSlotLoaded + slot), loaded_parity >> slot & 1);
        loaded_parity ^= 1u << slot;
        const bool dropped = clean_values<T, kHalf / kPanelColumns, kVRows, kCleaners>(
            s_memory + kMemory.ring_offset + slot * kWideSlotBytes, w.present, key,
            threadIdx.x - 32);
        // Before the slot is full, so that whoever has waited for it knows.
        if (dropped) mailbox()->dropped[number % 2][half] = number + 1;
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

  // --- consumers ---

  // What both halves do alike.
  template <typename Ring>
  struct Consumer {
    const WideBlock& block;
    Ring ring;
    float r_o[kHalf / 2];  // [64 rows, kHalf], unnormalised

    __device__ __forceinline__ bool is_first_lane() const { return threadIdx.x % 32 == 0; }

    __device__ __forceinline__ int32_t next_tile_index(uint32_t number) {
      const int32_t index = block.read_tile(number);
      __syncwarp();
      if (is_first_lane()) ptx::mbarrier_arrive_at(block.barrier(kTileFree), 0);
      return index;
    }

    __device__ __forceinline__ void wait_slot() {
      ptx::mbarrier_wait(block.barrier(kSlotFull + ring.slot), ring.parity);
    }
    // To both blocks: either loads the next half of the slot for both.
    __device__ __forceinline__ void release(int slot) {
      const uint32_t lane = threadIdx.x % 32;
      if (lane < kWideCluster) ptx::mbarrier_arrive_at(block.barrier(kSlotFree + slot), lane);
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
      for (int i = 0; i < kHalf / 2; ++i) r_o[i] = 0;
    }
    __device__ __forceinline__ void rescale(const float (&correction)[2]) {
#pragma unroll
      for (int i = 0; i < kHalf / 2; ++i) r_o[i] *= correction[i / 2 % 2];
    }

    __device__ __forceinline__ QueryRows<T> query_rows(const Work& w) const {
      return {block.args, w.at, block.order.packed_heads, block.block_queries()};
    }

    __device__ __forceinline__ void restore(const Work& w, uint32_t number, int half) {
      if (block.mailbox()->dropped[number % 2][half] != number + 1) return;
      ptx::named_sync(kWarpgroupBarrier + half, 128);  // all rows are stored
      query_rows(w).restore(w.present, w.keys, kTileK, 0, half * kHalf, (half + 1) * kHalf);
    }
  };

  struct Left : Consumer<LeftRing> {
    using Consumer<LeftRing>::block;
    using Consumer<LeftRing>::r_o;
    using Consumer<LeftRing>::ring;
    OnlineSoftmax softmax;
    uint32_t r_p[kTileK / 4];  // [64 rows, kTileK], rounded to T
    ScoreRow rows[2];
    float scale_log2;
    int last_slot;  // of K, not yet released

    __device__ __forceinline__ void issue_scores(float (&s)[kTileK / 2]) {
      ptx::keep(s);
#pragma unroll
      for (int slot = 0; slot < kKSlots; ++slot) {
        this->wait_slot();
        const uint64_t q =
            ptx::panel_descriptor(block.s_q + slot * kPanelsOfKSlot * kWideTileQ * 128);
        const uint64_t k = ptx::panel_descriptor(block.s_slot(ring.slot));
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < kPanelsOfKSlot * 4; ++i) {
          if (slot * kPanelsOfKSlot * 4 + i >= kDimQk / 16) continue;
          const int panel = i / 4, within = i % 4 * 32;
          ptx::Wgmma<kTileK, T>::template ss<0>(
              s, q + ptx::descriptor_offset(panel * kWideTileQ * 128 + within),
              k + ptx::descriptor_offset(panel * kTileK * 128 + within), slot + i != 0);
        }
        ptx::wgmma_commit();
        if (slot > 0) {
          ptx::wgmma_wait<1>();
          this->release(last_slot);
        }
        last_slot = ring.slot;
        ring.next();
      }
    }

    int v_slot;  // the first of the values under way

    __device__ __forceinline__ void issue_values() {
      ptx::keep(r_o);
      ptx::keep(r_p);
      v_slot = ring.slot;
#pragma unroll
      for (int slot = 0; slot < kVSlots; ++slot) {
        this->wait_slot();
        const uint64_t v = ptx::panel_descriptor(block.s_slot(ring.slot), kVRows * 128);
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < kVRows / 16; ++i) {
          ptx::Wgmma<kHalf, T>::template rs<1>(r_o, r_p + 4 * (slot * (kVRows / 16) + i),
                                               v + ptx::descriptor_offset(i * 16 * 128), 1);
        }
        ptx::wgmma_commit();
        ring.next();
      }
    }

    __device__ __forceinline__ void finish_values() {
      ptx::wgmma_wait<0>();
      ptx::keep(r_o);
#pragma unroll
      for (int i = 0; i < kVSlots; ++i) {
        this->release(v_slot);
        v_slot = LeftRing::after(v_slot);
      }
    }

    template <bool kHides>
    __device__ __forceinline__ void weigh(float (&s)[kTileK / 2], int32_t tile) {
      if constexpr (kScores != Scores::kPlain) transform_scores(s, block.args);
      if constexpr (kScores == Scores::kMasked) {
        mask_scores<T>(s, block.args, rows, tile * kTileK);
      } else if constexpr (kHides) {
        hide_keys(s, rows, tile * kTileK);
      }
      softmax.raise(s, scale_log2);
      softmax.weigh(s, scale_log2);
    }

    // Packs P, and hands it and the corrections to the right warpgroup.
    __device__ __forceinline__ void hand_over(const float (&s)[kTileK / 2]) {
#pragma unroll
      for (int i = 0; i < kTileK / 4; ++i) r_p[i] = ptx::pack<T>(s[2 * i], s[2 * i + 1]);
      ptx::named_sync(kWeightsFree, 256);
      const int lane = threadIdx.x % 32;
      const uint32_t row = block.s_weights() + (threadIdx.x % 128 / 32 * 16 + lane % 16) * 128;
#pragma unroll
      for (int i = 0; i < kTileK / 16; ++i) {
        const uint32_t chunk = (i % 4 * 2 + lane / 16) ^ (lane % 8);
        ptx::stmatrix(row + i / 4 * kWideTileQ * 128 + chunk * 16, r_p[4 * i], r_p[4 * i + 1],
                      r_p[4 * i + 2], r_p[4 * i + 3]);
      }
      if (lane % 4 == 0) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          block.s_factors()[accumulator_row(r)] = softmax.correction[r];
        }
      }
      ptx::async_proxy_fence();
      ptx::named_arrive(kWeightsFull, 256);
    }

    __device__ __forceinline__ void first_tile(int32_t tile) {
      float s[kTileK / 2];
      issue_scores(s);
      ptx::wgmma_wait<0>();
      ptx::keep(s);
      this->release(last_slot);
      weigh<true>(s, tile);
      hand_over(s);
    }

    // Scores of `tile` and the values of the tile before, which softmax hides.
    template <bool kHides>
    __device__ __forceinline__ void next_tile(int32_t tile) {
      float s[kTileK / 2];
      issue_scores(s);
      if (softmax.corrects) this->rescale(softmax.correction);
      issue_values();
      ptx::wgmma_wait<kVSlots>();
      ptx::keep(s);
      this->release(last_slot);
      weigh<kHides>(s, tile);
      finish_values();
      hand_over(s);
    }

    __device__ __forceinline__ void last_values() {
      if (softmax.corrects) this->rescale(softmax.correction);
      issue_values();
      finish_values();
    }

    __device__ __forceinline__ void store(const QueryRows<T>& query_rows) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const auto place = query_rows.place(accumulator_row(r));
        query_rows.store_log_sum_exp(place, softmax.finish(r, scale_log2, query_rows.sink(place)));
      }
      ptx::named_sync(kNormFree, 256);
      if (threadIdx.x % 4 == 0) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          block.s_factors()[kNorms + accumulator_row(r)] = softmax.correction[r];
        }
      }
      ptx::named_arrive(kNormFull, 256);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        query_rows.store(r_o, r, query_rows.place(accumulator_row(r)), softmax.correction[r], 0);
      }
    }

    // Notes which keys this thread's rows see; returns which tiles the cluster works on.
    __device__ __forceinline__ KeyTiles enter(const Work& w) {
      const QueryRows<T> query_rows = this->query_rows(w);
#pragma unroll
      for (int r = 0; r < 2; ++r) rows[r] = query_rows.scores(w.present, accumulator_row(r));
      return w.keys;
    }

    __device__ __forceinline__ void run() {
      scale_log2 = kScores == Scores::kPlain ? block.args.scale * kLog2E : kLog2E;
      for (uint32_t number = 0;; ++number) {
        const int32_t index = this->next_tile_index(number);
        if (index < 0) return;
        const KeyTiles keys = enter(block.work(index));
        softmax = OnlineSoftmax{};
        this->clear();
        ptx::mbarrier_wait(block.barrier(kQFull), number % 2);
        int32_t n = keys.end - 1;
        if (n >= keys.begin) {
          // From a full tile on, down to here, all are full: one comparison a tile.
          const int32_t full_begin = max(keys.begin, keys.full_begin);
          first_tile(n--);
          while (n >= keys.begin) {
#pragma unroll 1
            for (; n >= keys.begin && !keys.is_full(n); --n) next_tile<true>(n);
#pragma unroll 1
            for (; n >= full_begin; --n) next_tile<false>(n);
          }
          if (this->is_first_lane()) ptx::mbarrier_arrive(block.barrier(kQFree));
          last_values();
        } else {
          if (this->is_first_lane()) ptx::mbarrier_arrive(block.barrier(kQFree));
        }
        const Work w = block.work(index);
        store(this->query_rows(w));
        this->restore(w, number, 0);
      }
    }
  };

  struct Right : Consumer<RightRing> {
    using Consumer<RightRing>::block;
    using Consumer<RightRing>::r_o;
    using Consumer<RightRing>::ring;

    __device__ __forceinline__ void values() {
      ptx::named_sync(kWeightsFull, 256);
      const float correction[2] = {block.s_factors()[accumulator_row(0)],
                                   block.s_factors()[accumulator_row(1)]};
      if (__any_sync(~0u, correction[0] != 1 || correction[1] != 1)) this->rescale(correction);
      ptx::keep(r_o);
      int last_slot = 0;
      const uint64_t p = ptx::panel_descriptor(block.s_weights());
#pragma unroll
      for (int slot = 0; slot < kVSlots; ++slot) {
        this->wait_slot();
        const uint64_t v = ptx::panel_descriptor(block.s_slot(ring.slot), kVRows * 128);
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < kVRows / 16; ++i) {
          const int step = slot * (kVRows / 16) + i;
          ptx::Wgmma<kHalf, T>::template ss<1>(
              r_o, p + ptx::descriptor_offset(step / 4 * kWideTileQ * 128 + step % 4 * 32),
              v + ptx::descriptor_offset(i * 16 * 128), 1);
        }
        ptx::wgmma_commit();
        if (slot > 0) {
          ptx::wgmma_wait<1>();
          this->release(last_slot);
        }
        last_slot = ring.slot;
        ring.next();
      }
      ptx::wgmma_wait<0>();
      ptx::keep(r_o);
      this->release(last_slot);
      ptx::named_arrive(kWeightsFree, 256);
    }

    __device__ __forceinline__ void run() {
      ptx::named_arrive(kWeightsFree, 256);
      ptx::named_arrive(kNormFree, 256);
      for (uint32_t number = 0;; ++number) {
        const int32_t index = this->next_tile_index(number);
        if (index < 0) return;
        const Work w = block.work(index);
        this->clear();
#pragma unroll 1
        for (int32_t n = w.keys.end; n > w.keys.begin; --n) values();
        ptx::named_sync(kNormFull, 256);
        const float norm[2] = {block.s_factors()[kNorms + accumulator_row(0)],
                               block.s_factors()[kNorms + accumulator_row(1)]};
        ptx::named_arrive(kNormFree, 256);
        const QueryRows<T> query_rows = this->query_rows(w);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          query_rows.store(r_o, r, query_rows.place(accumulator_row(r)), norm[r], kHalf);
        }
        this->restore(w, number, 1);
      }
    }
  };
};

template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores>
__global__ void __launch_bounds__(kWideThreads, 1)
    sm90_prefill_wide(const __grid_constant__ PrefillMaps maps,
                      const __grid_constant__ AttentionArgs args,
                      const __grid_constant__ TileOrder order) {
  using Block = WideBlock<kDimQk, kDimV, kDtype, kScores>;
  constexpr WideTile kTile = Block::kTile;
  extern __shared__ __align__(1024) unsigned char s_memory[];
  const Block block{
      maps, args, order, s_memory, ptx::shared_address(s_memory), ptx::cluster_rank()};
  if (threadIdx.x == 0) block.init_barriers();
  __syncthreads();
  ptx::cluster_sync();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::registers_give<kTile.producer_registers>();
    if (threadIdx.x == 0) {
      block.produce();
    } else if (threadIdx.x >= 32) {
      block.clean();
    }
  } else if (warpgroup == 1) {
    ptx::registers_take<kTile.left_registers>();
    typename Block::Left left{{block}};
    left.run();
  } else {
    ptx::registers_take<kTile.right_registers>();
    typename Block::Right right{{block}};
    right.run();
  }
  ptx::cluster_sync();  // no block leaves while the other may still write into it
}

template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores>
const void* wide_instance() {
  return reinterpret_cast<const void*>(&sm90_prefill_wide<kDimQk, kDimV, kDtype, kScores>);
}

}  // namespace wh::cuda
