// sm90_decode: few queries against many keys, on Hopper.
//
// Schedule: a block an SM. A block owns up to 64 query rows that share a kv head (queries x heads
// of the group, query-major) and one share of the key tiles that any of them sees. One producer
// thread streams K and V tiles by TMA through one ring of slots (K0 V0 K1 V1 ..., up to 192 KB in
// flight); the consumer warpgroup does S = Q K^T from shared memory, masks, online softmax, and O
// += P V with P in registers, one after the other. V wider than 256 is split over two warpgroups,
// which both compute S. Several shares of keys leave normalised partial rows, merged by combine.cu.
//
// Roofline: (dim_qk + dim_v) * 2 bytes a key out of memory. At dim 256 a tile of 64 keys is 64 KB
// or 5,000 clocks of one SM's share of 2.9 TB/s, and its products are 1,024 clocks at M = 64
// however few the rows: neither that padding nor the serial order of the steps shows. Tiles of 32
// keys were 9 % slower at 16K keys.
//
// NaN and infinity in V: a key that no row of the block sees is zeroed in shared memory before it
// meets the weight 0. A key that some rows see and others do not is rare enough (array masks,
// several queries) to be looked for afterwards: a warp whose sums came out NaN or infinite computes
// them again without tensor cores, skipping what each row must not see.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/common/key_range.h"
#include "cuda/common/online_softmax.cuh"
#include "cuda/common/scores.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/decode/kernel.h"
#include "cuda/sm90/decode/tiles.h"

namespace wh::cuda {
namespace decode {

constexpr int kPanelColumns = 64;
constexpr int kRowBytes = kPanelColumns * 2;  // of a panel

// What one block works on.
struct Item {
  int32_t batch_idx, head_kv, split;
  int32_t first_row, rows;  // of the pair's len_q * group rows
  Keys present;
  Keys seen;  // by some row
  KeyTiles tiles;
  int32_t tile_begin, tile_end;  // of this split
  bool is_mixed;                 // some key is seen by some rows only

  __device__ __forceinline__ Item(const DecodeArgs& args, int tile_q, int tile_k) {
    const AttentionArgs& a = args.attention;
    // Fastest are the row tiles, which read the same keys.
    int32_t index = blockIdx.x;
    int32_t next = args.row_tiles.quotient(index);
    first_row = args.row_tiles.remainder(index, next) * tile_q;
    index = next;
    next = args.splits.quotient(index);
    split = args.splits.remainder(index, next);
    index = next;
    batch_idx = args.heads_kv.quotient(index);
    head_kv = args.heads_kv.remainder(index, batch_idx);
    rows = min(tile_q, a.len_q * a.group - first_row);
    present = present_keys(a, batch_idx);
    const int32_t first_query = args.group.quotient(first_row);
    const int32_t last_query = args.group.quotient(first_row + rows - 1);
    const Keys first = visible_keys(a, present, first_query);
    const Keys last = visible_keys(a, present, last_query);
    seen = {first.begin, last.end};
    is_mixed = a.mask_kind != MaskKind::kNone || first.begin != last.begin || first.end != last.end;
    tiles = key_tiles(a, present, first_query, last_query, tile_k);
    // Even shares; the first ones take what is left over.
    const int32_t count = max(0, tiles.end - tiles.begin);
    const int32_t share = args.splits.quotient(count);
    const int32_t left = args.splits.remainder(count, share);
    tile_begin = tiles.begin + share * split + min(split, left);
    tile_end = tile_begin + share + (split < left ? 1 : 0);
  }
};

// One of the rows that a block works on.
struct QueryRow {
  int32_t head, query;
  __device__ __forceinline__ QueryRow(const DecodeArgs& args, const Item& item, int32_t row) {
    const int32_t packed = item.first_row + row;
    query = args.group.quotient(packed);
    head = item.head_kv * args.attention.group + args.group.remainder(packed, query);
  }
};

// A position in the ring of slots and the parity of its next completion.
template <int kSlots>
struct RingPosition {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

template <typename Tile>
struct Shared {
  uint32_t q, ring, full, empty;
  __device__ __forceinline__ explicit Shared(const void* base)
      : q(ptx::shared_address(base)),
        ring(q + Tile::kQueryBytes),
        full(ring + Tile::kSlots * Tile::kSlotBytes),
        empty(full + 8 * Tile::kSlots) {}
  __device__ __forceinline__ uint32_t slot(int i) const { return ring + i * Tile::kSlotBytes; }
};

// The byte of 8 columns (a 16-byte chunk) of a row in panels of [rows][64], as TMA swizzles them.
__device__ __forceinline__ int panel_offset(int row, int chunk, int panel_rows) {
  return (chunk / 8 * panel_rows + row) * kRowBytes + ((chunk % 8) ^ (row % 8)) * 16;
}

// The key tile that the n-th load of the ring's sequence takes: K and V in turn, or K alone where V
// lies in it.
__device__ __forceinline__ int32_t load_key_tile(const DecodeArgs& args, const Item& item, int n) {
  return item.tile_begin + (args.values == Values::kInKeys ? n : n / 2);
}

template <typename Tile>
__device__ __forceinline__ void load_tile(const DecodeMaps& maps, const DecodeArgs& args,
                                          const Item& item, const Shared<Tile>& shared, int n,
                                          int slot) {
  const bool is_v = args.values == Values::kOwn && n % 2 == 1;
  const int key = load_key_tile(args, item, n) * Tile::kTileK;
  const int panels = (is_v ? Tile::kDimV : Tile::kDimQk) / kPanelColumns;
  const CUtensorMap* map = is_v ? &maps.v : &maps.k;
  const int head = item.head_kv * (is_v ? args.v_head_step : args.k_head_step);
  const int batch_idx = item.batch_idx * (is_v ? args.v_batch_step : args.k_batch_step);
  const uint32_t full = shared.full + 8 * slot;
  constexpr int kPanelBytes = Tile::kTileK * kRowBytes;
  ptx::mbarrier_expect(full, panels * kPanelBytes);
  for (int panel = 0; panel < panels; ++panel) {
    ptx::tma_load_4d(shared.slot(slot) + panel * kPanelBytes, map, full, panel * kPanelColumns, key,
                     head, batch_idx, ptx::CacheHint::kEvictFirst);
  }
}

// Q into shared memory by ordinary loads: rows are heads and queries at once, which TMA describes
// for no layout with fewer than six dimensions, and 32 KB are small. Missing columns and rows are
// 0. Each warp loads its share of the rows; a lane knows where one of them is.
template <typename Tile, typename T>
struct QueryLoader {
  static constexpr int kChunks = Tile::kDimQk / 8;  // of 16 bytes, a row
  static constexpr int kWarpRows = Tile::kTileQ / (Tile::kConsumers / 32);
  static constexpr int kLoads = kWarpRows * kChunks / 32;

  const T* q;
  int64_t row_offset;  // of row `lane` of the warp's
  int first_row, rows, lane, chunks;

  __device__ __forceinline__ QueryLoader(const DecodeArgs& args, const Item& item)
      : q(static_cast<const T*>(args.q) + item.batch_idx * args.stride_q[0]),
        first_row(threadIdx.x / 32 * kWarpRows),
        rows(item.rows),
        lane(threadIdx.x % 32),
        chunks(args.attention.dim_qk / 8) {
    const QueryRow at(args, item, first_row + lane % kWarpRows);
    row_offset = at.head * args.stride_q[1] + at.query * args.stride_q[2];
  }

  __device__ __forceinline__ void load(unsigned char* s_q) const {
    uint4 loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int row = (lane + 32 * i) / kChunks, chunk = (lane + 32 * i) % kChunks;
      const int64_t offset = __shfl_sync(~0u, row_offset, row);
      loaded[i] = make_uint4(0, 0, 0, 0);
      if (first_row + row < rows && chunk < chunks) {
        loaded[i] = *reinterpret_cast<const uint4*>(q + offset + chunk * 8);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int row = (lane + 32 * i) / kChunks, chunk = (lane + 32 * i) % kChunks;
      *reinterpret_cast<uint4*>(s_q + panel_offset(first_row + row, chunk, Tile::kTileQ)) =
          loaded[i];
    }
  }
};

// Zeroes the V rows of keys that no row of the block sees.
template <typename Tile>
__device__ __forceinline__ void clear_unseen(unsigned char* s_v, Keys seen, int32_t tile_key) {
  constexpr int kPanels = Tile::kDimV / kPanelColumns;
  for (int i = threadIdx.x; i < kPanels * Tile::kTileK * 8; i += Tile::kConsumers) {
    const int32_t key = tile_key + i / 8 % Tile::kTileK;
    if (key >= seen.begin && key < seen.end) continue;
    reinterpret_cast<uint4*>(s_v)[i] = make_uint4(0, 0, 0, 0);
  }
}

template <typename T>
__device__ __forceinline__ float2 load_pair(const void* from) {
  if constexpr (sizeof(T) == 2 && std::is_same_v<T, __half>) {
    return __half22float2(*static_cast<const __half2*>(from));
  } else {
    return __bfloat1622float2(*static_cast<const __nv_bfloat162*>(from));
  }
}

// The sums of V again, one key at a time and in full precision, of this thread's two rows. Slow,
// and right whatever lies in V: hidden keys are not read. The largest scores are already known.
template <typename Tile, typename T>
__device__ __forceinline__ void redo_sums(float (&o)[Tile::kColumns / 2], const DecodeArgs& args,
                                          const Item& item, const ScoreRow (&rows)[2],
                                          const OnlineSoftmax& softmax, float scale_log2,
                                          const unsigned char* s_q, int first_row,
                                          int first_column) {
  const AttentionArgs& a = args.attention;
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < Tile::kColumns / 2; ++i) o[i] = 0;
  const T* k = static_cast<const T*>(args.k) + item.batch_idx * args.stride_k[0] +
               item.head_kv * args.stride_k[1];
  const T* v =
      static_cast<const T*>(a.v) + item.batch_idx * a.stride_v[0] + item.head_kv * a.stride_v[1];
  const int32_t begin = max(item.seen.begin, item.tile_begin * Tile::kTileK);
  const int32_t end = min(item.seen.end, item.tile_end * Tile::kTileK);
#pragma unroll 1
  for (int32_t key = begin; key < end; ++key) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float dot[1] = {0};
#pragma unroll 1
      for (int d = column; d < a.dim_qk; d += 8) {
        const float2 x =
            load_pair<T>(s_q + panel_offset(first_row + 8 * r, d / 8, Tile::kTileQ) + d % 8 * 2);
        const float2 y = load_pair<T>(k + key * args.stride_k[2] + d);
        dot[0] = fmaf(x.x, y.x, fmaf(x.y, y.y, dot[0]));
      }
      dot[0] += __shfl_xor_sync(~0u, dot[0], 1);
      dot[0] += __shfl_xor_sync(~0u, dot[0], 2);
      if (static_cast<uint32_t>(key - rows[r].first_key) >= rows[r].key_count) continue;
      const float bias = mask_bias<T>(a, rows[r], key);
      if (bias == -INFINITY) continue;
      if (args.scores != Scores::kPlain) transform_scores(dot, a);
      const float shift = softmax.largest[r] == -INFINITY ? 0 : softmax.largest[r] * scale_log2;
      const float p = ptx::exp2_approx(fmaf(dot[0] + bias, scale_log2, -shift));
#pragma unroll
      for (int i = 0; i < Tile::kColumns / 8; ++i) {
        const int d = first_column + 8 * i + column;
        if (d >= a.dim_v) continue;
        const float2 y = load_pair<T>(v + key * a.stride_v[2] + d);
        o[4 * i + 2 * r] = fmaf(p, y.x, o[4 * i + 2 * r]);
        o[4 * i + 2 * r + 1] = fmaf(p, y.y, o[4 * i + 2 * r + 1]);
      }
    }
    __syncwarp();
  }
}

// Whether some sum of some lane of the warp is NaN or infinite.
template <int kCount>
__device__ __forceinline__ bool any_not_finite(const float (&o)[kCount]) {
  float zero = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) zero = fmaf(o[i], 0.0f, zero);
  return __any_sync(~0u, zero != 0);
}

// Writes one of a thread's two rows: the answer, or this split's part of it.
template <typename Tile, typename T>
__device__ __forceinline__ void store_row(float (&o)[Tile::kColumns / 2], int r,
                                          const DecodeArgs& args, const Item& item, QueryRow at,
                                          float factor, float log_sum, int first_column) {
  const AttentionArgs& a = args.attention;
  const int64_t row = (int64_t{item.batch_idx} * a.heads_q + at.head) * a.len_q + at.query;
  const int thread_column = first_column + threadIdx.x % 4 * 2;
  const int columns = a.dim_v - thread_column;  // from this thread's first one on
  if (factor == 0) {                            // a row without weight: its sums may be 0 * NaN
#pragma unroll
    for (int i = 0; i < Tile::kColumns / 8; ++i) o[4 * i + 2 * r] = o[4 * i + 2 * r + 1] = 0;
  }
  const Partials& partials = args.partials;
  if (partials.splits > 1) {
    const int64_t to = item.split * partials.rows + row;
    if (thread_column == 0) partials.log_sum_exp[to] = log_sum;
    if (log_sum == -INFINITY) return;  // nobody reads its sums
    float* sums = partials.sums + to * partials.columns + thread_column;
#pragma unroll
    for (int i = 0; i < Tile::kColumns / 8; ++i) {
      if (8 * i >= columns) continue;
      *reinterpret_cast<float2*>(sums + 8 * i) =
          make_float2(o[4 * i + 2 * r] * factor, o[4 * i + 2 * r + 1] * factor);
    }
    return;
  }
  if (thread_column == 0 && a.log_sum_exp != nullptr) a.log_sum_exp[row] = log_sum;
  T* out = static_cast<T*>(a.out) + item.batch_idx * a.stride_out[0] + at.head * a.stride_out[1] +
           at.query * a.stride_out[2] + thread_column;
#pragma unroll
  for (int i = 0; i < Tile::kColumns / 8; ++i) {
    if (8 * i >= columns) continue;
    *reinterpret_cast<uint32_t*>(out + 8 * i) =
        ptx::pack<T>(o[4 * i + 2 * r] * factor, o[4 * i + 2 * r + 1] * factor);
  }
}

template <typename Tile, typename T>
__device__ __forceinline__ void consume(const DecodeArgs& args, const Item& item,
                                        const Shared<Tile>& shared, unsigned char* smem) {
  constexpr int kTileK = Tile::kTileK, kColumns = Tile::kColumns;
  constexpr int kKeyPanelBytes = kTileK * kRowBytes;
  constexpr int kQueryPanelBytes = Tile::kTileQ * kRowBytes;
  const AttentionArgs& a = args.attention;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_column = warp / 4 * kColumns;
  const int first_row = warp % 4 * 16 + lane / 4;
  ScoreRow rows[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {  // rows past the last one follow it, and are not stored
    const QueryRow at(args, item, min(first_row + 8 * r, item.rows - 1));
    rows[r] = score_row(a, item.present, item.batch_idx, at.head, at.query);
  }
  // Scores that are transformed first are in natural units by then.
  const float scale_log2 = args.scores == Scores::kPlain ? a.scale * kLog2E : kLog2E;
  const auto release = [&](int slot) {
    if (lane == 0) ptx::mbarrier_arrive(shared.empty + 8 * slot);
  };

  OnlineSoftmax softmax;
  float o[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) o[i] = 0;
  RingPosition<Tile::kSlots> ring;
#pragma unroll 1
  for (int32_t tile = item.tile_begin; tile < item.tile_end; ++tile) {
    const int32_t tile_key = tile * kTileK;
    float s[kTileK / 2];
    uint32_t p[kTileK / 4];
    ptx::mbarrier_wait(shared.full + 8 * ring.slot, ring.parity);
    {
      const uint64_t q = ptx::panel_descriptor(shared.q);
      const uint64_t k = ptx::panel_descriptor(shared.slot(ring.slot));
      ptx::keep(s);
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < Tile::kDimQk / 16; ++step) {
        const int panel = step / 4, within = step % 4 * 32;
        ptx::Wgmma<kTileK, T>::template ss<static_cast<int>(ptx::OperandB::kRowsAreN)>(
            s, q + ptx::descriptor_offset(panel * kQueryPanelBytes + within),
            k + ptx::descriptor_offset(panel * kKeyPanelBytes + within), step != 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::keep(s);
    }
    if (args.values == Values::kOwn) {
      release(ring.slot);
      ring.advance();
    }
    if (args.scores != Scores::kPlain) transform_scores(s, a);
    if (!item.tiles.is_full(tile)) {
      if (args.scores == Scores::kMasked) {
        mask_scores<T>(s, a, rows, tile_key);
      } else {
        hide_keys(s, rows, tile_key);
      }
    }
    softmax.update(s, scale_log2);
#pragma unroll
    for (int i = 0; i < kTileK / 4; ++i) p[i] = ptx::pack<T>(s[2 * i], s[2 * i + 1]);
    if (__any_sync(~0u, softmax.correction[0] != 1 || softmax.correction[1] != 1)) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) o[i] *= softmax.correction[i / 2 % 2];
    }
    if (args.values == Values::kOwn) {
      ptx::mbarrier_wait(shared.full + 8 * ring.slot, ring.parity);
    }
    // Past the end of K and V, TMA has left zeros.
    const bool has_unseen = tile_key < item.seen.begin ||
                            (tile_key + kTileK > item.seen.end && item.seen.end < a.len_k);
    if (has_unseen) {
      ptx::named_sync(1, Tile::kConsumers);
      clear_unseen<Tile>(smem + Tile::kQueryBytes + ring.slot * Tile::kSlotBytes, item.seen,
                         tile_key);
      ptx::async_proxy_fence();
      ptx::named_sync(1, Tile::kConsumers);
    }
    {
      const uint64_t v = ptx::panel_descriptor(
          shared.slot(ring.slot) + first_column / kPanelColumns * kKeyPanelBytes, kKeyPanelBytes);
      ptx::keep(o);
      ptx::keep(p);
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < kTileK / 16; ++step) {
        ptx::Wgmma<kColumns, T>::template rs<static_cast<int>(ptx::OperandB::kRowsAreK)>(
            o, p + 4 * step, v + ptx::descriptor_offset(step * 16 * kRowBytes), 1);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::keep(o);
    }
    release(ring.slot);
    ring.advance();
  }

  if (item.is_mixed && any_not_finite(o)) {
    redo_sums<Tile, T>(o, args, item, rows, softmax, scale_log2, smem, first_row, first_column);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool exists = first_row + 8 * r < item.rows;
    const QueryRow at(args, item, first_row + 8 * r);
    const bool joins_sink = args.partials.splits == 1 && a.sinks != nullptr && exists;
    const float log_sum = softmax.finish(r, scale_log2, joins_sink ? a.sinks[at.head] : -INFINITY);
    if (!exists) continue;
    store_row<Tile, T>(o, r, args, item, at, softmax.correction[r], log_sum, first_column);
  }
}

}  // namespace decode

template <Dtype kDtype>
using Element = std::conditional_t<kDtype == Dtype::kF16, __half, __nv_bfloat16>;

template <typename Tile, typename T>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    sm90_decode(const __grid_constant__ DecodeMaps maps, const __grid_constant__ DecodeArgs args) {
  using namespace decode;
  extern __shared__ __align__(1024) unsigned char smem[];
  const Shared<Tile> shared(smem);
  const bool is_producer = threadIdx.x == Tile::kConsumers;
  if (is_producer) {
    for (int i = 0; i < Tile::kSlots; ++i) {
      ptx::mbarrier_init(shared.full + 8 * i, 1);
      ptx::mbarrier_init(shared.empty + 8 * i, Tile::kConsumers / 32);
    }
    ptx::mbarrier_init_fence();
    if (args.attention.len_k > 0) {
      ptx::tma_prefetch(&maps.k);
      ptx::tma_prefetch(&maps.v);
    }
  }
  // Nothing that the kernel in front may have written is read before it has ended.
  const bool has_promise = args.fresh_keys >= 0;
  if (!has_promise &&
      (args.attention.key_lengths != nullptr || args.attention.key_starts != nullptr)) {
    ptx::wait_for_dependency();
  }
  const Item item(args, Tile::kTileQ, Tile::kTileK);
  const int loads = (item.tile_end - item.tile_begin) * (args.values == Values::kInKeys ? 1 : 2);
  if (is_producer) {
    // The ring is empty: its first tiles are on their way before the block is told of the barriers.
    const int first_loads = min(loads, Tile::kSlots);
    int i = 0;
    if (has_promise) {
      const int old_tiles = max(0, item.present.end - args.fresh_keys) / Tile::kTileK;
      for (; i < first_loads && load_key_tile(args, item, i) < old_tiles; ++i) {
        load_tile<Tile>(maps, args, item, shared, i, i);
      }
    }
    ptx::wait_for_dependency();
    for (; i < first_loads; ++i) load_tile<Tile>(maps, args, item, shared, i, i);
  } else if (threadIdx.x < Tile::kConsumers) {
    const QueryLoader<Tile, T> queries(args, item);
    ptx::wait_for_dependency();
    if (loads > 0) queries.load(smem);
    ptx::async_proxy_fence();
  }
  __syncthreads();
  ptx::launch_dependents();
  if (threadIdx.x >= Tile::kConsumers) {
    if constexpr (Tile::kWarpgroups == 2) ptx::registers_give<Tile::kProducerRegisters>();
    if (!is_producer) return;
    RingPosition<Tile::kSlots> ring;
    for (int i = Tile::kSlots; i < loads; ++i) {
      ptx::mbarrier_wait(shared.empty + 8 * ring.slot, ring.parity);
      load_tile<Tile>(maps, args, item, shared, i, ring.slot);
      ring.advance();
    }
    return;
  }
  if constexpr (Tile::kWarpgroups == 2) ptx::registers_take<Tile::kConsumerRegisters>();
  consume<Tile, T>(args, item, shared, smem);
}

}  // namespace wh::cuda
