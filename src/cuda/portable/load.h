// Which thread copies which piece of a tile into shared memory. Index arithmetic alone, so that it
// is tested without a GPU: `copy` takes the pieces.
#pragma once

#include <cstdint>

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
