// The keys that rows and tiles see, on the device: core/key_range.h in int32 results, and which key
// tiles a tile of queries can skip, need not mask, and must clean.
#pragma once

#include <cstdint>

#include "cuda/common/attention_args.h"

namespace wh::cuda {

struct Keys {
  int32_t begin;
  int32_t end;  // exclusive
};

constexpr int32_t clamp_to(int32_t value, int32_t low, int32_t high) {
  return value < low ? low : value > high ? high : value;
}

// The keys of one batch entry that exist at all.
constexpr Keys present_keys(const AttentionArgs& args, int32_t batch_idx) {
  Keys keys{0, args.len_k};
  if (args.key_lengths != nullptr) {
    keys.end = clamp_to(args.key_lengths[batch_idx], 0, args.len_k);
  }
  if (args.key_starts != nullptr) {
    keys.begin = clamp_to(args.key_starts[batch_idx], 0, keys.end);
  }
  return keys;
}

// Monotone: neither end moves left from one query to the next.
constexpr Keys visible_keys(const AttentionArgs& args, Keys present, int32_t query_idx) {
  int32_t diagonal = query_idx;
  if (args.causal != Causal::kTopLeft) diagonal += present.end - args.len_q;
  Keys keys = present;
  if (args.window_right != kUnlimited) {
    keys.end = clamp_to(diagonal + args.window_right + 1, present.begin, present.end);
  }
  if (args.window_left != kUnlimited) {
    keys.begin = clamp_to(diagonal - args.window_left, present.begin, present.end);
  }
  return keys;
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

constexpr KeyTiles key_tiles(const AttentionArgs& args, Keys present, int32_t first_query,
                             int32_t last_query, int32_t tile_k) {
  const Keys first = visible_keys(args, present, first_query);
  const Keys last = visible_keys(args, present, last_query);
  KeyTiles tiles{};
  if (last.end <= first.begin) return tiles;
  tiles.begin = first.begin / tile_k;
  tiles.end = (last.end + tile_k - 1) / tile_k;
  tiles.full_begin = (last.begin + tile_k - 1) / tile_k;
  tiles.full_end = first.end / tile_k;
  tiles.clean_end = first.end == args.len_k ? tiles.end : tiles.full_end;
  if (args.mask_kind != MaskKind::kNone) {
    tiles.full_begin = tiles.full_end = tiles.clean_end = tiles.begin;
  }
  return tiles;
}

}  // namespace wh::cuda
