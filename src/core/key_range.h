// Which keys a query may see: causal, window, key lengths and key starts in one place. The
// reference and the CPU kernels call this; array masks come on top. plan/work.cpp counts the same
// in closed form.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/problem.h"

namespace wh {

struct KeyRange {
  int64_t begin = 0;
  int64_t end = 0;  // exclusive; end <= begin: nothing is visible

  bool empty() const { return end <= begin; }
  int64_t size() const { return std::max<int64_t>(0, end - begin); }
};

// The keys of one batch entry that exist at all.
inline KeyRange present_keys(const Problem& problem, const Tensors& tensors, int64_t batch_idx) {
  KeyRange keys{0, problem.len_k};
  if (tensors.key_lengths != nullptr) {
    keys.end = std::clamp<int64_t>(tensors.key_lengths[batch_idx], 0, problem.len_k);
  }
  if (tensors.key_starts != nullptr) {
    keys.begin = std::max<int64_t>(0, tensors.key_starts[batch_idx]);
  }
  return keys;
}

// Bottom-right alignment puts the last query on the last present key; the diagonal follows the key
// length (as FlashAttention does for a preallocated cache) and ignores the key start.
inline KeyRange visible_keys(const Problem& problem, KeyRange present, int64_t query_idx) {
  const int64_t diagonal =
      problem.causal == Causal::kTopLeft ? query_idx : query_idx + present.end - problem.len_q;
  int64_t right = problem.window_right;
  if (problem.causal != Causal::kNone) right = 0;
  KeyRange visible = present;
  if (right != kUnlimited) visible.end = std::min(visible.end, diagonal + right + 1);
  if (problem.window_left != kUnlimited) {
    visible.begin = std::max(visible.begin, diagonal - problem.window_left);
  }
  return visible;
}

}  // namespace wh
