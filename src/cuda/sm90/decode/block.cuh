// What a block of sm90_decode works on, and how Q, K and V come into its shared memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/packed_rows.h"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/pairs.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/common/panels.h"
#include "cuda/sm90/common/widen.cuh"
#include "cuda/sm90/decode/kernel.h"

namespace wh::cuda::decode {

// Named barriers. 0 is __syncthreads(), which must stand in one place for the whole block.
enum Barrier : int { kConsumersMeet = 1, kQueriesRequested = 2, kBlockReady = 3 };

// The producer's mbarriers and the consumers' Q are in place; what comes next may start.
template <typename Tile>
__device__ __forceinline__ void meet_block() {
  __syncwarp();
  ptx::named_sync(kBlockReady, Tile::kThreads);
  ptx::launch_dependents();
}

// A unit as f32 has it, where there are no scales of tokens: 1.
constexpr uint32_t kNoUnit = 127u << 23;

// Where things are in shared memory, as 32-bit addresses. Consumers read `ring`, TMA fills `loads`,
// which is the same unless somebody widens between them.
template <typename Tile>
struct Shared {
  static constexpr int kWideBytes = Tile::kSlots * Tile::kSlotBytes;

  uint32_t q, ring, full, empty;
  uint32_t loads, loads_full, loads_empty;

  // Of codes, from the beginning on.
  static constexpr int scales_offset(int slot) {
    return Tile::kQueryBytes + Tile::kRingBytes + slot * Tile::kScaleBytes;
  }
  static constexpr int load_scales_offset(int slot) {
    return scales_offset(Tile::kSlots) + slot * Tile::kLoadScaleBytes;
  }
  static constexpr int row_factors_offset() { return load_scales_offset(Tile::kLoadSlots); }
  // Of the last tile's ValueUnit.
  static constexpr int unit_offset() { return row_factors_offset() + Tile::kTileQ * 4; }
  static constexpr int halves_offset() { return row_factors_offset() + Tile::kRowBytes; }

  __device__ __forceinline__ explicit Shared(const void* base)
      : q(ptx::shared_address(base)), ring(q + Tile::kQueryBytes) {
    full = ring + Tile::kRingBytes;
    if constexpr (Tile::kWidens) full = q + halves_offset() + Tile::kHalvesBytes;
    empty = full + 8 * Tile::kSlots;
    loads = Tile::kWidens ? ring + kWideBytes : ring;
    loads_full = Tile::kWidens ? empty + 8 * Tile::kSlots : full;
    loads_empty = Tile::kWidens ? loads_full + 8 * Tile::kLoadSlots : empty;
  }
  __device__ __forceinline__ uint32_t slot(int i) const { return ring + i * Tile::kSlotBytes; }
  __device__ __forceinline__ uint32_t load_slot(int i) const {
    return loads + i * Tile::kLoadBytes;
  }
};

// Which pages a share's boxes lie in. Each lane knows that of one of 32 boxes that follow each
// other; the next 32 are on their way, so that no tile waits for the table.
class BoxPages {
 public:
  __device__ __forceinline__ BoxPages(const DecodeArgs& args, const PackedItem& item,
                                      int32_t first_key)
      : args_(args),
        item_(item),
        first_box_(first_key >> args.box_keys_log2),
        page_(read(0)),
        next_page_(read(32)) {}

  // Of the tile that begins at `key`: a lane's is the page of the tile's box with its number. The
  // whole warp asks, for one tile after another: no tile begins among these 32 boxes and ends among
  // the next, since boxes of a tile are 1, 2, 4 or 8.
  __device__ __forceinline__ int32_t of_tile(int32_t key) {
    const int32_t box = key >> args_.box_keys_log2;
    if (box - first_box_ >= 32) {
      first_box_ += 32;
      page_ = next_page_;
      next_page_ = read(32);
    }
    return __shfl_sync(~0u, page_, box - first_box_ + threadIdx.x % 32);
  }

 private:
  // Entries past the keys that somebody sees may be anything, or not be there.
  __device__ __forceinline__ int32_t read(int32_t ahead) const {
    const int32_t key = (first_box_ + ahead + threadIdx.x % 32) << args_.box_keys_log2;
    return key < item_.seen.end ? item_.pages[key / args_.attention.page_size] : 0;
  }

  const DecodeArgs& args_;
  const PackedItem& item_;
  int32_t first_box_;
  int32_t page_, next_page_;
};

// Fills the ring's slots: K and V tiles in turn, or K tiles alone where V lies in them. All is done
// by one warp, of which one lane issues the copies, or one for each box of a tile: a lane that went
// from box to box took 0.1 us for each, and pages of 16 1.4 to 1.8 times as long as dense keys.
template <typename Tile>
struct TileLoader {
  const DecodeMaps& maps;
  const DecodeArgs& args;
  const PackedItem& item;
  const Shared<Tile>& shared;
  const bool is_leader;

  __device__ __forceinline__ int count() const {
    return (item.tile_end - item.tile_begin) * (args.values == Values::kInKeys ? 1 : 2);
  }
  // The key tile that load `n` takes.
  __device__ __forceinline__ int32_t tile(int n) const {
    return item.tile_begin + (args.values == Values::kInKeys ? n : n / 2);
  }

  // The scales of a tile's keys, where tokens have them, `page` as BoxPages says it. Those of keys
  // that nobody sees may not be there, and are 0. Warps that widen asked for them themselves, and
  // looked them up by their pages: a fifth of their instructions.
  __device__ __forceinline__ void request_scales(int n, int slot, int32_t page) const {
    const KvTensor& of = n % 2 == 1 ? args.stored_v : args.stored_k;
    if (has_token_scales(of)) {
      const float* head = of.scales_data + item.head_kv * of.stride_scales[1];
#pragma unroll
      for (int i = threadIdx.x % 32; i < Tile::kTileK; i += 32) {
        const int32_t key = tile(n) * Tile::kTileK + i;
        const bool exists = key >= item.seen.begin && key < item.seen.end;
        int32_t batch_idx = item.sequence.key_batch, token = item.sequence.first_key + key;
        if (item.pages != nullptr) {
          batch_idx = __shfl_sync(~0u, page, i >> args.box_keys_log2);
          token = key % args.attention.page_size;
        }
        const float* from =
            exists ? head + batch_idx * of.stride_scales[0] + token * of.stride_scales[2] : head;
        ptx::cp_async<4>(shared.q + Shared<Tile>::load_scales_offset(slot) + 4 * i, from,
                         exists ? 4 : 0);
      }
    }
    ptx::cp_async_arrive(shared.loads_full + 8 * slot);
  }

  // Keys that lie side by side.
  __device__ __forceinline__ void load(int n, int slot) const {
    if constexpr (Tile::kWidens) request_scales(n, slot, 0);
    if (!is_leader) return;
    const bool is_v = args.values == Values::kOwn && n % 2 == 1;
    const CUtensorMap* map = is_v ? &maps.v : &maps.k;
    const MapUse& use = is_v ? args.use_v : args.use_k;
    const int key = item.sequence.first_key + tile(n) * Tile::kTileK;
    const int head = item.head_kv * use.head_step;
    const int batch_idx = item.sequence.key_batch * use.batch_step;
    const uint32_t full = shared.loads_full + 8 * slot;
    constexpr int kPanelBytes = panel_bytes(Tile::kTileK);
    ptx::mbarrier_expect(full,
                         (is_v ? Tile::kDimV : Tile::kDimQk) / Tile::kStoredColumns * kPanelBytes);
    for (int box = 0; box < use.boxes; ++box) {
      ptx::tma_load_5d(shared.load_slot(slot) + box * kPanelBytes, map, full,
                       box * Tile::kStoredColumns, key, 0, head, batch_idx,
                       ptx::CacheHint::kEvictFirst);
    }
  }

  // Keys in pages: boxes of so many rows that none crosses a page. Those past the last key
  // that somebody sees are left out: what then lies in the slot is hidden and cleared like any
  // other unseen key.
  __device__ __forceinline__ void load(int n, int slot, BoxPages& pages) const {
    const bool is_v = args.values == Values::kOwn && n % 2 == 1;
    const CUtensorMap* map = is_v ? &maps.v : &maps.k;
    const MapUse& use = is_v ? args.use_v : args.use_k;
    const int head = item.head_kv * use.head_step;
    const uint32_t full = shared.loads_full + 8 * slot;
    const int32_t begin = tile(n) * Tile::kTileK;
    const int32_t end = min(begin + Tile::kTileK, item.seen.end);
    const int box_keys = 1 << args.box_keys_log2;
    const int box_bytes = panel_bytes(box_keys);
    const int boxes = (end - begin + box_keys - 1) >> args.box_keys_log2;
    int page = pages.of_tile(begin);  // and all have seen the slot empty
    if constexpr (Tile::kWidens) request_scales(n, slot, page);
    page *= use.batch_step;
    if (is_leader) {
      ptx::mbarrier_expect(
          full, boxes * ((is_v ? Tile::kDimV : Tile::kDimQk) / Tile::kStoredColumns) * box_bytes);
    }
    const int lane = threadIdx.x % 32;
    if (lane < boxes) {
      const uint32_t to = shared.load_slot(slot) + lane * box_bytes;
      const int32_t token = (begin + lane * box_keys) % args.attention.page_size;
      for (int box = 0; box < use.boxes; ++box) {
        ptx::tma_load_5d(to + box * panel_bytes(Tile::kTileK), map, full,
                         box * Tile::kStoredColumns, token, 0, head, page,
                         ptx::CacheHint::kEvictFirst);
      }
    }
    __syncwarp();
  }
};

// Q into shared memory by copies of 16 bytes a thread: rows are heads and queries at once, which
// TMA describes for no layout with fewer than six dimensions, and 32 KB are small. Missing columns
// and rows are 0. Each warp copies its share of the rows. Addresses come first, as they may before
// Q may be read. Through registers every fifth load waited for the answers of those before it: 1.2
// us.
template <typename Tile, typename T>
struct QueryLoader {
  static constexpr int kChunks = Tile::kDimQk / 8;  // of 16 bytes, a row
  static constexpr int kWarpRows = Tile::kTileQ / (Tile::kConsumers / 32);
  static constexpr int kLoads = kWarpRows * kChunks / 32;

  const T* from[kLoads];
  int32_t rows, columns;  // that exist

  static __device__ __forceinline__ int row(int i) {
    return threadIdx.x / 32 * kWarpRows + (threadIdx.x % 32 + 32 * i) / kChunks;
  }
  static __device__ __forceinline__ int chunk(int i) {
    return (threadIdx.x % 32 + 32 * i) % kChunks;
  }

  __device__ __forceinline__ QueryLoader(const DecodeArgs& args, const PackedItem& item)
      : rows(item.rows), columns(args.attention.dim_qk) {
    // A lane knows where one of the warp's rows is.
    const PackedRow at(args.attention, args.rows, item,
                       threadIdx.x / 32 * kWarpRows + threadIdx.x % kWarpRows);
    const int64_t row_offset = at.offset(args.stride_q, item);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      from[i] = static_cast<const T*>(args.q) + __shfl_sync(~0u, row_offset, row(i) % kWarpRows) +
                chunk(i) * 8;
    }
  }

  __device__ __forceinline__ void request(uint32_t s_q) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const bool exists = row(i) < rows && chunk(i) * 8 < columns;
      ptx::cp_async<16>(s_q + chunk_offset(row(i), chunk(i), Tile::kTileQ), from[i],
                        exists ? 16 : 0);
    }
    ptx::cp_async_commit();
  }
  // Once they are there for wgmma to read.
  __device__ __forceinline__ void wait() const {
    ptx::cp_async_wait<0>();
    ptx::async_proxy_fence();
  }

  // The same where wgmma takes f16, as codes become: of bf16 each thread converts what it has
  // copied. Rows are multiplied by powers of two, each by its own: a tiny row beside a huge one
  // would be left with no bits. Of every eighth power that which brings the largest element to
  // [2^8, 2^16): rows of much the same size then share one (Consumer::note_row_factors()), and
  // those between 2^-4 and 2^4 do. `factors` takes what scores of each row are to be multiplied by:
  // `scale`, which all keys share, over that power. What f16 rounds, elements below 2^-14, it
  // rounds by at most 2^-33 of the row's largest. NaN and infinity do not count, and stay what they
  // are.
  __device__ __forceinline__ void wait_widened(unsigned char* q, float* factors,
                                               float scale) const {
    // Of rows that do not exist too.
    if (threadIdx.x % 32 < kWarpRows) {
      factors[threadIdx.x / 32 * kWarpRows + threadIdx.x % 32] = scale;
    }
    if constexpr (std::is_same_v<T, __half>) {
      wait();
      return;
    }
    __syncwarp();
    constexpr int kLanes = kChunks < 32 ? kChunks : 32;  // of a row
    constexpr int kRowLoads = kChunks / kLanes;
    constexpr int kAtOnce = 4;  // rows: their steps hide each other
    static_assert(kLanes * kRowLoads == kChunks && kLoads % (kAtOnce * kRowLoads) == 0);
    ptx::cp_async_wait<0>();
#pragma unroll 1
    for (int first = 0; first < kLoads; first += kAtOnce * kRowLoads) {
      if (threadIdx.x / 32 * kWarpRows + 32 * first / kChunks >= rows) break;
      const auto place = [&](int i) {
        return reinterpret_cast<uint4*>(
            q + chunk_offset(row(first + i), chunk(first + i), Tile::kTileQ));
      };
      uint4 chunks[kAtOnce * kRowLoads];
      uint32_t tops[kAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce * kRowLoads; ++i) {
        const uint4 of = chunks[i] = *place(i);
        for (const uint32_t pair : {of.x, of.y, of.z, of.w}) {
          uint32_t& top = tops[i / kRowLoads];
          top = ptx::max_pairs(top, ptx::finite_magnitudes(pair));
        }
      }
#pragma unroll
      for (uint32_t& top : tops) top = max(top & 0x7fff, top >> 16 & 0x7fff);
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2) {
#pragma unroll
        for (uint32_t& top : tops) top = max(top, __shfl_xor_sync(~0u, top, step));
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int power = power_of(tops[i]);
        const uint32_t factor = (127 + power) * 0x00800080u;
        const auto convert = [&](uint32_t pair) {
          pair = ptx::multiply_pairs(pair, factor);
          return ptx::pack<__half>(__uint_as_float(pair << 16),
                                   __uint_as_float(pair & 0xffff0000u));
        };
#pragma unroll
        for (int j = i * kRowLoads; j < (i + 1) * kRowLoads; ++j) {
          const uint4 of = chunks[j];
          *place(j) = make_uint4(convert(of.x), convert(of.y), convert(of.z), convert(of.w));
        }
        if (chunk(first + i * kRowLoads) == 0) {
          factors[row(first + i * kRowLoads)] = scale * __uint_as_float((127 - power) << 23);
        }
      }
    }
    __syncwarp();
    ptx::async_proxy_fence();
  }

 private:
  // Of a row whose largest element is `top`, as bf16 has it.
  static __device__ __forceinline__ int power_of(uint32_t top) {
    if (top == 0) return 12;  // as of most rows
    const int exponent = static_cast<int>(top >> 7) - 127;
    return min(((11 - exponent) & ~7) + 4, 124);  // 2^128 bf16 does not hold
  }
};

// Zeroes the V rows of keys that no row of the block sees.
template <typename Tile>
__device__ __forceinline__ void clear_unseen(unsigned char* s_v, Keys seen, int32_t tile_key) {
  constexpr int kPanels = Tile::kDimV / kPanelColumns;
  // Unrolled, it keeps registers through the loop over tiles that codes have no more of.
  constexpr int kAtOnce = Tile::kWidens ? 1 : 4;
#pragma unroll kAtOnce
  for (int i = threadIdx.x; i < kPanels * Tile::kTileK * 8; i += Tile::kConsumers) {
    const int32_t key = tile_key + i / 8 % Tile::kTileK;
    if (key >= seen.begin && key < seen.end) continue;
    reinterpret_cast<uint4*>(s_v)[i] = make_uint4(0, 0, 0, 0);
  }
  __syncwarp();
}

}  // namespace wh::cuda::decode
