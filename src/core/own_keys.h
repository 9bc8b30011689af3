// All keys of a sequence, those that its key length or start leaves out too: each has a gradient,
// if only 0, where core/sequence.h says what may be read.
#pragma once

#include "core/sequence.h"

namespace wh {

template <typename Int>
constexpr Int own_keys(const SequencesOf<Int>& all, Int batch_idx) {
  if (all.key_offsets == nullptr) return all.len_k;
  return packed_tokens(all.key_offsets, batch_idx, all.len_k, all.total_k).length;
}

}  // namespace wh
