// What a block of sm90_decode works on, and how Q, K and V come into its shared memory.
#pragma once

#include <cstdint>

#include "cuda/common/packed_rows.h"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/common/panels.h"
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

// Where things are in shared memory, as 32-bit addresses. Consumers read `ring`, TMA fills `loads`,
// which is the same unless somebody widens between them.
template <typename Tile>
struct Shared {
  static constexpr int kWideBytes = Tile::kSlots * Tile::kSlotBytes;
  static constexpr int kScalesOffset = Tile::kQueryBytes + Tile::kRingBytes;

  uint32_t q, ring, full, empty;
  uint32_t loads, loads_full, loads_empty;

  __device__ __forceinline__ explicit Shared(const void* base)
      : q(ptx::shared_address(base)), ring(q + Tile::kQueryBytes) {
    full = ring + Tile::kRingBytes;
    if constexpr (Tile::kWidens) full += Tile::kSlots * Tile::kScaleBytes;
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

  // Keys that lie side by side.
  __device__ __forceinline__ void load(int n, int slot) const {
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
    const int page = pages.of_tile(begin) * use.batch_step;  // and all have seen the slot empty
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
  __syncwarp();
}

}  // namespace wh::cuda::decode
