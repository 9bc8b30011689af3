#include "parallel/view.h"

#include <algorithm>

#include "core/key_range.h"

namespace wh::sharded {

std::vector<KeyGroup> key_groups(const ShardedProblem& s) {
  std::vector<KeyGroup> groups;
  for (int64_t b = 0; b < s.whole.batch; ++b) {
    const KeyRange keys =
        present_keys<int64_t>(s.whole.len_k, s.key_lengths.empty() ? nullptr : s.key_lengths.data(),
                              s.key_starts.empty() ? nullptr : s.key_starts.data(), b);
    const TokenRange present{keys.begin, keys.end};
    if (!groups.empty() && groups.back().present == present) {
      groups.back().batch_end = b + 1;
    } else {
      groups.push_back({b, b + 1, present});
    }
  }
  return groups;
}

View view_of(const Problem& p, TokenRange present, TokenRange q, TokenRange k) {
  k = intersection(k, present);
  // Query i lies on key i + shift.
  const int64_t shift = p.causal == Causal::kTopLeft ? 0 : present.end - p.len_q;
  const int64_t right = keys_right_of_diagonal(p), left = p.window_left;
  if (right != kUnlimited) {
    k.end = std::min(k.end, q.end + shift + right);
    q.begin = std::max(q.begin, k.begin - shift - right);
  }
  if (left != kUnlimited) {
    k.begin = std::max(k.begin, q.begin + shift - left);
    q.end = std::min(q.end, k.end - shift + left);
  }
  View view{q, k};
  if (view.empty()) return view;
  // The diagonal of the part is bottom-right: it ends where the part does, and its window makes up
  // for what lies between that and the whole's.
  const int64_t first = q.begin + shift - k.begin, last = first + q.size() - 1;
  const int64_t distance = first - (k.size() - q.size());
  if (right != kUnlimited && first + right + 1 < k.size()) view.window_right = right + distance;
  if (left != kUnlimited && last - left > 0) view.window_left = left - distance;
  return view;
}

namespace {

// Of one side of the views of all sequences.
TokenRange hull_of(TokenRange View::*side, const ShardedProblem& s, TokenRange q, TokenRange k) {
  TokenRange whole;
  for (const KeyGroup& group : key_groups(s)) {
    const View view = view_of(s.whole, group.present, q, k);
    if (!view.empty()) whole = hull(whole, view.*side);
  }
  return whole;
}

}  // namespace

TokenRange seen_keys(const ShardedProblem& s, TokenRange q, TokenRange k) {
  return hull_of(&View::k, s, q, k);
}

TokenRange seeing_queries(const ShardedProblem& s, TokenRange q, TokenRange k) {
  return hull_of(&View::q, s, q, k);
}

}  // namespace wh::sharded
