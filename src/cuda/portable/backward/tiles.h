// Tile sizes of cuda_portable_backward by head dimensions, element size and the card's shared
// memory.
#pragma once

#include <initializer_list>

#include "cuda/common/instance.h"
#include "cuda/gradients/items.h"

namespace wh::cuda {

constexpr int kBackwardThreads = 256;
constexpr int kBackwardItemBytes = 64;      // of a block's BackwardItem
constexpr int kBackwardQueryRowBytes = 32;  // of a QueryRow

struct BackwardTile {
  int rows;           // of the block's side; 16 a warp
  int columns;        // of the other side, at once
  int column_groups;  // warps that share rows, and split columns and dimensions
  int stages;         // tiles of the other side in shared memory
  int pitch_qk, pitch_v, pitch_p;
  int bytes;

  // Tiles of 8 columns whose scores one of the groups computes. The last groups may have none.
  constexpr int slice_tiles() const {
    return columns / 8 > column_groups ? columns / 8 / column_groups : 1;
  }
};

constexpr BackwardTile backward_tile_of(HeadDims dims, int element_bytes, Side side, int rows,
                                        int columns, int stages) {
  BackwardTile tile{};
  tile.rows = rows;
  tile.columns = columns;
  tile.column_groups = kBackwardThreads / 32 * 16 / rows;
  tile.stages = stages;
  // As ldmatrix wants them in 16 bits (portable/tiles.h). In f32 rows are read down columns and
  // along them, of which one has conflicts whatever the pitch.
  tile.pitch_qk = dims.dim_qk + 8;
  tile.pitch_v = dims.dim_v + 8;
  tile.pitch_p = tile.column_groups > 1 ? columns + 8 : 0;
  const int query_rows = side == Side::kQueries ? rows : stages * columns;
  tile.bytes = (rows + stages * columns) * (tile.pitch_qk + tile.pitch_v) * element_bytes +
               2 * rows * tile.pitch_p * element_bytes + query_rows * kBackwardQueryRowBytes +
               kBackwardItemBytes;
  return tile;
}

// The most rows whose sums fit the registers, then the most columns. Two products a fragment of the
// block's own rows where some tile has them: f32 splits each fragment once more for every use. Two
// stages: with one, nothing is multiplied while a tile arrives.
constexpr BackwardTile backward_tile(HeadDims dims, int element_bytes, Side side,
                                     SharedMemory memory) {
  const int sums = side == Side::kKeys ? dims.dim_qk + dims.dim_v : dims.dim_qk;
  const int most_sums = element_bytes == 2 ? 256 : 128;  // columns of a warp's 16 rows
  const int most_columns = element_bytes == 2 ? 64 : 32;
  const int least_columns = element_bytes == 2 ? 16 : 8;  // of one product
  for (const int slice_tiles : {2, 1}) {
    for (int stages = 2; stages >= 1; --stages) {
      for (int rows = 128; rows >= 16; rows /= 2) {
        if (sums * rows > most_sums * 128) continue;
        for (int columns = most_columns; columns >= least_columns; columns /= 2) {
          const BackwardTile tile =
              backward_tile_of(dims, element_bytes, side, rows, columns, stages);
          if (tile.slice_tiles() < slice_tiles) continue;
          if (tile.bytes <= static_cast<int>(memory)) return tile;
        }
      }
    }
  }
  return {};
}

// Whether the two classes of cards need two tiles.
constexpr bool backward_depends_on_memory(HeadDims dims, int element_bytes) {
  for (const Side side : {Side::kQueries, Side::kKeys}) {
    if (backward_tile(dims, element_bytes, side, SharedMemory::kSmall).bytes !=
        backward_tile(dims, element_bytes, side, SharedMemory::kLarge).bytes) {
      return true;
    }
  }
  return false;
}

}  // namespace wh::cuda
