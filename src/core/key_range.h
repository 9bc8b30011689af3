// Which keys a query may see: causal, window, key lengths and key starts in one place, for the host
// in 64 bits and for devices in 32. Array masks come on top. plan/work.cpp counts the same in
// closed form.
#pragma once

#include <cstdint>

#include "core/problem.h"
#include "core/score_rules.h"

namespace wh {

template <typename Int>
struct KeyRangeOf {
  Int begin;
  Int end;  // exclusive; end <= begin: nothing is visible

  constexpr bool empty() const { return end <= begin; }
  constexpr Int size() const { return empty() ? 0 : end - begin; }
};
using KeyRange = KeyRangeOf<int64_t>;

template <typename Int>
constexpr Int clamp_to(Int value, Int low, Int high) {
  return value < low ? low : value > high ? high : value;
}

// The keys of one batch entry that exist at all.
template <typename Int>
constexpr KeyRangeOf<Int> present_keys(Int len_k, const int32_t* key_lengths,
                                       const int32_t* key_starts, Int batch_idx) {
  KeyRangeOf<Int> keys{0, len_k};
  if (key_lengths != nullptr) keys.end = clamp_to<Int>(key_lengths[batch_idx], 0, len_k);
  if (key_starts != nullptr) keys.begin = clamp_to<Int>(key_starts[batch_idx], 0, keys.end);
  return keys;
}
inline KeyRange present_keys(const Problem& problem, const Tensors& tensors, int64_t batch_idx) {
  return present_keys(problem.len_k, tensors.key_lengths, tensors.key_starts, batch_idx);
}

// Keys around each query's diagonal that stay visible; kUnlimited: all of that side.
template <typename Int>
struct Window {
  Int left, right;
};

// Bottom-right alignment puts the last query on the last present key; the diagonal follows the key
// length (as FlashAttention does for a preallocated cache) and ignores the key start. Monotone:
// neither end moves left from one query to the next.
template <typename Int>
constexpr KeyRangeOf<Int> visible_keys(Causal causal, Window<Int> window, Int len_q,
                                       KeyRangeOf<Int> present, Int query_idx) {
  Int diagonal = query_idx;
  if (causal != Causal::kTopLeft) diagonal += present.end - len_q;
  KeyRangeOf<Int> keys = present;
  if (window.right != kUnlimited) {
    keys.end = clamp_to<Int>(diagonal + window.right + 1, present.begin, present.end);
  }
  if (window.left != kUnlimited) {
    keys.begin = clamp_to<Int>(diagonal - window.left, present.begin, present.end);
  }
  return keys;
}
inline KeyRange visible_keys(const Problem& problem, KeyRange present, int64_t query_idx) {
  return visible_keys<int64_t>(problem.causal,
                               {problem.window_left, keys_right_of_diagonal(problem)},
                               problem.len_q, present, query_idx);
}

}  // namespace wh
