// Tile sizes of cuda_portable by head dimensions, element size and the card's shared memory.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "cuda/common/instance.h"

namespace wh::cuda {

constexpr int kPortableItemBytes = 96;  // of the block's PackedItem

struct PortableTile {
  int rows;           // of queries, a block
  int warp_rows;      // a warp: 16, or 32 where two accumulators fit its registers
  int column_groups;  // warps that share rows and split the columns of V
  int keys;
  bool shares_buffer;              // V waits until K has been read, and the other way round
  int pitch_qk, pitch_v, pitch_p;  // elements of a row in shared memory
  int bytes;

  constexpr int row_warps() const { return rows / warp_rows; }
  constexpr int warps() const { return row_warps() * column_groups; }
  constexpr int threads() const { return 32 * warps(); }
  // Blocks that an SM holds by its registers: 256 threads of 255 of them.
  constexpr int resident() const { return threads() <= 128 ? 2 : 1; }
  // Whether tiles of keys may lie in several pages. The scores of 32 rows and 64 keys or more leave
  // no registers for a second way to load one: beside sums of 128 columns, and on compute
  // capability 12.0 beside those of 64, it spilled.
  constexpr bool takes_cut_tiles() const { return warp_rows < 32 || keys < 64; }
  // Key tiles of 8 whose scores one of the column groups computes. The last groups may have none.
  constexpr int slice_tiles() const {
    return keys / 8 > column_groups ? keys / 8 / column_groups : 1;
  }
};

constexpr PortableTile portable_tile_of(HeadDims dims, int element_bytes, int rows, int keys,
                                        bool shares_buffer) {
  PortableTile tile{};
  tile.rows = rows;
  tile.warp_rows = rows == 128 ? 32 : 16;
  // 64 x 256 by four warps leaves one a scheduler in f32: eight are 1.25 times faster.
  const int most_columns = element_bytes == 2 ? 256 : 128;
  tile.column_groups = dims.dim_v < 2 * most_columns ? 1 : dims.dim_v / most_columns;
  tile.keys = keys;
  tile.shares_buffer = shares_buffer;
  // 16-bit: ldmatrix reads 8 rows of 16 bytes at once, 16 bytes apart by the banks. f32: pairs of
  // columns of 4 rows (Q, K, P), one column of 8 rows, two apart (V).
  tile.pitch_qk = dims.dim_qk + 8;
  tile.pitch_v = dims.dim_v + (element_bytes == 2 ? 8 : 4);
  tile.pitch_p = tile.column_groups > 1 ? keys + 8 : 0;
  const int keys_bytes = keys * tile.pitch_qk * element_bytes;
  const int values_bytes = keys * tile.pitch_v * element_bytes;
  tile.bytes = rows * (tile.pitch_qk + tile.pitch_p) * element_bytes + keys_bytes +
               (shares_buffer ? 0 : values_bytes) +
               (tile.column_groups > 1 ? rows * tile.column_groups * 4 : 0) + 16 +
               kPortableItemBytes;
  return tile;
}

// The most rows, then the most keys, that fit. 128 rows of 16-bit narrow heads read each fragment
// of K and V for two products instead of one.
constexpr PortableTile portable_tile(HeadDims dims, int element_bytes, SharedMemory memory) {
  if (element_bytes == 2 && dims.dim_qk <= 128 && dims.dim_v <= 128) {
    // As many as do not spill. On compute capability 12.0 64 do beside 32 x 128 sums, and 96 beside
    // 32 x 64.
    const int keys = dims.dim_v <= 64 ? 96 : 64;
    return portable_tile_of(dims, element_bytes, 128,
                            memory == SharedMemory::kSmall ? keys - 32 : keys, false);
  }
  const int least_keys = element_bytes == 2 ? 16 : 8;  // of one product
  // Eight warps at most: more would have to share 65,536 registers.
  const int groups = portable_tile_of(dims, element_bytes, 16, 16, true).column_groups;
  const int most_rows = groups == 1 ? 64 : 128 / groups;
  // In f32 both halves of the weights of 64 keys spill beside 192 columns of sums, and 64 keys of
  // 192 columns leave no room for a second block.
  const int most_keys = element_bytes == 4 && (dims.dim_qk > 128 || dims.dim_v > 128) ? 32 : 64;
  for (const bool shares_buffer : {false, true}) {
    for (int rows = most_rows; rows >= 16; rows /= 2) {
      for (int keys = most_keys; keys >= (shares_buffer ? least_keys : 16); keys /= 2) {
        const PortableTile tile = portable_tile_of(dims, element_bytes, rows, keys, shares_buffer);
        if (tile.bytes <= static_cast<int>(memory)) return tile;
      }
    }
  }
  return {};
}

// How many pages the keys of a tile lie in; dense and packed ones count as one.
enum class TilePages : int32_t { kOne, kSeveral };

constexpr PortableTile portable_tile(HeadDims dims, int element_bytes, SharedMemory memory,
                                     TilePages pages) {
  const PortableTile tile = portable_tile(dims, element_bytes, memory);
  if (pages == TilePages::kOne || tile.takes_cut_tiles()) return tile;
  return portable_tile_of(dims, element_bytes, tile.rows, 32, false);
}

// Whether the two classes of cards need two tiles, and so two instances: not for 64/64 in f32, for
// 192/128, nor for 192/192 in 16 bits (in f32, 64 x 64 of 128/128 take 103,536 bytes, 2,160 more
// than the small ones have).
constexpr bool depends_on_memory(HeadDims dims, int element_bytes) {
  return portable_tile(dims, element_bytes, SharedMemory::kSmall).bytes !=
         portable_tile(dims, element_bytes, SharedMemory::kLarge).bytes;
}

}  // namespace wh::cuda
