// The sequences of a batch and the keys that rows and tiles see, on the device: core/sequence.h,
// core/key_rows.h and core/key_range.h in 32 bits, and which key tiles a tile of queries can skip,
// need not mask, and must clean.
#pragma once

#include <cstdint>

#include "core/key_range.h"
#include "cuda/common/attention_args.h"

namespace wh::cuda {

using Keys = KeyRangeOf<int32_t>;
using Sequence = SequenceOf<int32_t>;
using KeyRows = KeyRowsOf<int32_t, Divisor>;

// For kernels that are handed dense tensors alone.
constexpr Keys dense_keys(const AttentionArgs& args, int32_t batch_idx) {
  return present_keys(args.len_k, args.key_lengths, args.key_starts, batch_idx);
}
constexpr Sequence dense_sequence(const AttentionArgs& args, int32_t batch_idx, Keys present) {
  return {batch_idx, batch_idx, 0, args.len_q, batch_idx, 0, present};
}
constexpr Sequence dense_sequence(const AttentionArgs& args, int32_t batch_idx) {
  return dense_sequence(args, batch_idx, dense_keys(args, batch_idx));
}
constexpr Keys visible_keys(const AttentionArgs& args, const Sequence& sequence,
                            int32_t query_idx) {
  return wh::visible_keys<int32_t>(args.causal, {args.window_left, args.window_right},
                                   sequence.len_q, sequence.present, query_idx);
}

using Queries = KeyRangeOf<int32_t>;

// The first query of a head that is past something which every query behind it is past too: both
// ends of what a query sees move right with it.
template <typename IsPast>
constexpr int32_t first_query_past(const AttentionArgs& args, const Sequence& sequence,
                                   IsPast is_past) {
  int32_t begin = 0, end = sequence.len_q;
  while (begin < end) {
    const int32_t middle = begin + (end - begin) / 2;
    if (is_past(visible_keys(args, sequence, middle))) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

// The queries outside of which none sees a key of `keys`: those that end behind the first key are
// the last ones, and those that begin before the last key the first ones.
constexpr Queries queries_that_see(const AttentionArgs& args, const Sequence& sequence, Keys keys) {
  return {first_query_past(args, sequence, [&](Keys seen) { return seen.end > keys.begin; }),
          first_query_past(args, sequence, [&](Keys seen) { return seen.begin >= keys.end; })};
}
// Those that see all of them.
constexpr Queries queries_that_see_all(const AttentionArgs& args, const Sequence& sequence,
                                       Keys keys) {
  return {first_query_past(args, sequence, [&](Keys seen) { return seen.end >= keys.end; }),
          first_query_past(args, sequence, [&](Keys seen) { return seen.begin > keys.begin; })};
}

// Key tiles of `tile_k` keys that queries first..last work on, from the last one down. All are tile
// indices; ends are exclusive.
struct KeyTiles {
  int32_t begin, end;            // that some query may see
  int32_t full_begin, full_end;  // that every query sees whole: nothing to mask
  int32_t clean_end;             // like full_end, but TMA's zeros past the tensor need no cleaning

  constexpr bool is_full(int32_t tile) const { return tile >= full_begin && tile < full_end; }
  // Whether some key of the tile is hidden from some query, so that a NaN or an infinity in its V
  // must not meet the weight 0.
  constexpr bool is_clean(int32_t tile) const { return tile >= full_begin && tile < clean_end; }
};

constexpr KeyTiles key_tiles(const AttentionArgs& args, const Sequence& sequence,
                             int32_t first_query, int32_t last_query, int32_t tile_k) {
  const Keys first = visible_keys(args, sequence, first_query);
  const Keys last = visible_keys(args, sequence, last_query);
  KeyTiles tiles{};
  if (last.end <= first.begin) return tiles;
  tiles.begin = first.begin / tile_k;
  tiles.end = (last.end + tile_k - 1) / tile_k;
  tiles.full_begin = (last.begin + tile_k - 1) / tile_k;
  tiles.full_end = first.end / tile_k;
  tiles.clean_end = first.end == args.zeros_from ? tiles.end : tiles.full_end;
  if (args.mask_kind != MaskKind::kNone) {
    tiles.full_begin = tiles.full_end = tiles.clean_end = tiles.begin;
  }
  return tiles;
}

}  // namespace wh::cuda
