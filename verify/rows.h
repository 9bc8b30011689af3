// Rows of a tensor on all cores: the largest cases have 10^9 elements.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/executor.h"
#include "core/rounding.h"

namespace wh {

// On all cores: the first touch of a GB takes longer on one than many a run.
inline void fill_bytes(std::byte* begin, size_t size, std::byte with) {
  constexpr size_t kPiece = size_t{4} << 20;
  parallel(default_executor(), static_cast<int32_t>((size + kPiece - 1) / kPiece), [&](int32_t i) {
    const size_t done = static_cast<size_t>(i) * kPiece;
    std::fill_n(begin + done, std::min(kPiece, size - done), with);
  });
}

struct RowIndex {
  int64_t batch_idx, head, idx;
};

// Calls body(row) for every row of [batch, heads, length], in any order and from several threads.
template <typename Body>
void for_each_row(int64_t batch, int64_t heads, int64_t length, Body&& body) {
  constexpr int64_t kRowsAtOnce = 64;  // few rows are not worth a second thread
  const int64_t rows = batch * heads * length;
  const auto blocks = static_cast<int32_t>(divide_up(rows, kRowsAtOnce));
  parallel(default_executor(), blocks, [&](int32_t block) {
    const int64_t end = std::min(rows, (int64_t{block} + 1) * kRowsAtOnce);
    for (int64_t row = int64_t{block} * kRowsAtOnce; row < end; ++row) {
      body(RowIndex{row / length / heads, row / length % heads, row % length});
    }
  });
}

}  // namespace wh
