// Which thread copies which piece of a tile into shared memory. Index arithmetic alone, so that it
// is tested without a GPU: `copy` takes the pieces.
#pragma once

#include <cstdint>

#include "cuda/common/key_range.h"

namespace wh::cuda::portable {

// Rows of one tile as they lie in memory.
template <typename T>
struct TileRows {
  const T* first;  // row 0, which need not exist
  int64_t stride, stride_dim;
  int32_t dim;
  int32_t begin, end;  // rows that exist; the others are not read
  bool is_whole;       // 16 bytes at a time: aligned rows of whole pieces, side by side

  constexpr bool exists(int row) const { return row >= begin && row < end; }
};

// kRows rows of kColumns columns, element by element. Rows that do not exist and columns past `dim`
// become 0.
template <int kRows, int kColumns, int kThreads, typename T, typename OffsetOf, typename Copy>
constexpr void load_elements(int thread, const TileRows<T>& rows, OffsetOf offset_of, Copy copy) {
#pragma unroll 1
  for (int i = thread; i < kRows * kColumns; i += kThreads) {
    const int row = i / kColumns, column = i % kColumns;
    const bool exists = rows.exists(row) && column < rows.dim;
    copy.element(row, column,
                 exists ? rows.first[offset_of(row) + column * rows.stride_dim] : T(0.0f));
  }
}

// Rows one stride apart. A chunk that is not to be read is copied with 0 bytes, which fills it with
// zeros; its address may be anything. Unrolled, and with addresses that grow by a constant: at 40
// instructions a chunk, copying took longer than multiplying.
template <int kRows, int kColumns, int kThreads, typename T, typename Copy>
constexpr void load_rows(int thread, const TileRows<T>& rows, Copy copy) {
  if (!rows.is_whole) {
    load_elements<kRows, kColumns, kThreads>(
        thread, rows, [&](int row) { return row * rows.stride; }, copy);
    return;
  }
  constexpr int kChunk = 16 / sizeof(T);
  constexpr int kRowChunks = kColumns / kChunk;
  constexpr int kChunks = kRows * kRowChunks;
  constexpr int kTrips = (kChunks + kThreads - 1) / kThreads;
  if constexpr (kThreads % kRowChunks == 0) {  // a thread keeps its column
    constexpr int kRowStep = kThreads / kRowChunks;
    const int first_row = thread / kRowChunks, column = thread % kRowChunks * kChunk;
    const int bytes = column < rows.dim ? 16 : 0;
    const T* from = rows.first + first_row * rows.stride + column;
    const int64_t step = kRowStep * rows.stride;
#pragma unroll
    for (int n = 0; n < kTrips; ++n) {
      const int row = first_row + n * kRowStep;
      if (kChunks % kThreads == 0 || row < kRows) {
        copy.chunk(row, column, from, rows.exists(row) ? bytes : 0);
      }
      from += step;
    }
  } else {
#pragma unroll
    for (int n = 0; n < kTrips; ++n) {
      const int i = thread + n * kThreads;
      const int row = i / kRowChunks, column = i % kRowChunks * kChunk;
      if (kChunks % kThreads == 0 || i < kChunks) {
        copy.chunk(row, column, rows.first + row * rows.stride + column,
                   rows.exists(row) && column < rows.dim ? 16 : 0);
      }
    }
  }
}

// Keys of a tile that lies in several pages, from `first_key` on; TileRows::first is where the
// pages begin. A warp takes rows beside each other, so that it looks for a page where one begins
// and not for every chunk. Rolled: addresses ahead take registers that the sums need.
template <int kRows, int kColumns, int kThreads, typename T, typename Copy>
constexpr void load_pages(int thread, const TileRows<T>& rows, const KeyRows& keys,
                          int64_t stride_page, int32_t first_key, Copy copy) {
  const auto offset_of = [&](int row) {
    return keys.offset(stride_page, rows.stride, first_key + row);
  };
  if (!rows.is_whole) {
    load_elements<kRows, kColumns, kThreads>(thread, rows, offset_of, copy);
    return;
  }
  constexpr int kChunk = 16 / sizeof(T);
  constexpr int kRowChunks = kColumns / kChunk;
  constexpr int kChunks = kRows * kRowChunks;
  constexpr int kWarpChunks = (kChunks + kThreads - 1) / kThreads * 32;
  const int begin = thread / 32 * kWarpChunks + thread % 32;
  int run_end = 0;       // of the rows beside the last one that was looked for
  int64_t run_base = 0;  // of row 0, if it were one of them
#pragma unroll 1
  for (int i = begin; i < begin - thread % 32 + kWarpChunks && i < kChunks; i += 32) {
    const int row = i / kRowChunks, column = i % kRowChunks * kChunk;
    const bool exists = rows.exists(row) && column < rows.dim;
    if (exists && row >= run_end) {
      run_base = offset_of(row) - row * rows.stride;
      run_end = row + keys.run(first_key + row, first_key + kRows);
    }
    const int64_t offset = exists ? run_base + row * rows.stride + column : 0;
    copy.chunk(row, column, rows.first + offset, exists ? 16 : 0);
  }
}

// Rows anywhere: `offset_of` gives the offset from TileRows::first of a row that exists.
template <int kRows, int kColumns, int kThreads, typename T, typename OffsetOf, typename Copy>
constexpr void load_scattered(int thread, const TileRows<T>& rows, OffsetOf offset_of, Copy copy) {
  if (!rows.is_whole) {
    load_elements<kRows, kColumns, kThreads>(thread, rows, offset_of, copy);
    return;
  }
  constexpr int kChunk = 16 / sizeof(T);
  constexpr int kRowChunks = kColumns / kChunk;
#pragma unroll 4
  for (int i = thread; i < kRows * kRowChunks; i += kThreads) {
    const int row = i / kRowChunks, column = i % kRowChunks * kChunk;
    const bool exists = rows.exists(row) && column < rows.dim;
    copy.chunk(row, column, rows.first + (exists ? offset_of(row) + column : 0), exists ? 16 : 0);
  }
}

}  // namespace wh::cuda::portable
