// Tiles of rows of packed queries, on the device. How many each sequence has is known there alone,
// so all sequences together are given as many slots as they can have tiles at most, all rows / tile
// + batch, and a slot finds its tile by the offsets: sequence b has slots from rows in front of it
// / tile + b on, which are as many as its tiles, or one more. Tiles of the longest sequence for
// each one would be hundreds of times more where one has a prompt and the others a token.
#pragma once

#include <cstdint>

#include "cuda/common/attention_args.h"

namespace wh::cuda {

struct SlotRule {
  int32_t token_rows;  // rows of a token, in front of the division into tiles
  int32_t tile_rows;
};

// Of sequences with `total_rows` rows together.
constexpr int64_t slot_count(int64_t total_rows, int64_t tile_rows, int64_t batch) {
  return total_rows / tile_rows + batch;
}

constexpr int32_t first_slot(const AttentionArgs& args, SlotRule rule, int32_t batch_idx) {
  const int32_t tokens = clamp_to<int32_t>(args.query_offsets[batch_idx], 0, args.total_q);
  return tokens * rule.token_rows / rule.tile_rows + batch_idx;
}

// Where the sequence has fewer tiles, the slot is empty. Whatever the offsets hold, both indices
// are not negative and the sequence is one of the batch.
struct SlotTile {
  int32_t batch_idx;
  int32_t tile;
};
constexpr SlotTile slot_tile(const AttentionArgs& args, SlotRule rule, int32_t slot) {
  SlotTile at{0, slot};
  for (int32_t end = args.batch; end - at.batch_idx > 1;) {
    const int32_t middle = at.batch_idx + (end - at.batch_idx) / 2;
    const int32_t first = first_slot(args, rule, middle);
    if (first <= slot) {
      at = {middle, slot - first};
    } else {
      end = middle;
    }
  }
  return at;
}

}  // namespace wh::cuda
