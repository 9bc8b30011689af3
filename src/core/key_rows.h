// Where the rows of K and V of one sequence lie, for host and device: side by side where keys are
// dense or packed, in the pages of a table where they are paged. Kernels loop over runs of keys
// that follow each other; a dense sequence is one run.
#pragma once

#include <cstdint>

#include "core/sequence.h"

namespace wh {

// PageSize: Int, or what divides an Int faster.
template <typename Int, typename PageSize = Int>
struct KeyRowsOf {
  const int32_t* pages;  // of the sequence, in order; null: rows lie side by side
  PageSize page_size;
  Int key_batch;  // index into K's first dimension where there are no pages
  Int first_key;  // and of the sequence's first token there

  // K's first and third index of a key of the sequence.
  struct Place {
    Int batch_idx, token_idx;
  };
  constexpr Place place(Int key) const {
    if (pages == nullptr) return {key_batch, first_key + key};
    return {pages[key / page_size], key % page_size};
  }
  // In elements, for strides of the batch (or page) and of tokens.
  constexpr int64_t offset(int64_t batch_stride, int64_t token_stride, Int key) const {
    const Place at = place(key);
    return at.batch_idx * batch_stride + at.token_idx * token_stride;
  }
  // How many keys from this one on, and before `end`, lie one token stride apart.
  constexpr Int run(Int key, Int end) const {
    const Int left = end - key;
    if (pages == nullptr) return left;
    const Int in_page = static_cast<Int>(page_size) - key % page_size;
    return left < in_page ? left : in_page;
  }
};
using KeyRows = KeyRowsOf<int64_t>;

// Plain data for a kernel's arguments.
struct PageTable {
  const int32_t* entries;  // null: keys are not paged
  const int32_t*
      offsets;  // where a sequence's entries begin; null: one row of `stride` after another
  int64_t stride;

  constexpr const int32_t* of(int64_t batch_idx) const {
    if (entries == nullptr) return nullptr;
    return entries + (offsets != nullptr ? offsets[batch_idx] : batch_idx * stride);
  }
};

template <typename Int, typename PageSize>
constexpr KeyRowsOf<Int, PageSize> key_rows(const int32_t* pages, PageSize page_size,
                                            const SequenceOf<Int>& sequence) {
  return {pages, page_size, sequence.key_batch, sequence.first_key};
}

inline PageTable page_table_of(const Problem& p, const Tensors& t) {
  if (p.key_layout != KeyLayout::kPaged) return {nullptr, nullptr, 0};
  return {t.page_table, p.has_page_offsets ? t.page_offsets : nullptr, p.stride_page_table};
}
inline KeyRows key_rows(const Problem& p, const Tensors& t, const Sequence& sequence) {
  return key_rows(page_table_of(p, t).of(sequence.batch_idx), p.page_size, sequence);
}

}  // namespace wh
