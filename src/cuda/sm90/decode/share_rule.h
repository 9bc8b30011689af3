// How many blocks share the keys of each sequence of a batch where lengths differ: by total keys,
// since one sequence may have as many as all others together. For planning, and for each block.
#pragma once

#include <algorithm>
#include <cstdint>

namespace wh::cuda {

// Counts are of key tiles, and of the shares of one kv head.
struct ShareRule {
  int32_t wave_shares = 0;  // that run at once; 0: every sequence has as many shares
  int32_t most_splits = 1;  // shares of a sequence
  int32_t even_splits = 1;  // the best number where all are as long as the longest can be
  int32_t least_tiles = 1;  // of a share that pays for its block

  // A share's, where `sum` tiles are those of all sequences and `most` those of the longest. 0:
  // lengths are nearly equal, and even_splits serves all of them. Else shares are a fourth of what
  // a place for blocks works on, so that all end together; longer where few have many, and where
  // they would not pay for a block. With a twelfth, blocks that found no share cost calls over
  // equal lengths 10 us of 146: 0.9 us a wave of them.
  constexpr int32_t share_tiles(int32_t batch, int32_t sum, int32_t most) const {
    if (int64_t{most} * batch <= int64_t{sum} + sum / 4) return 0;
    const int32_t least = std::min(least_tiles, divide_up(sum, wave_shares));
    const int32_t fair = std::max(least, divide_up(sum, wave_shares * kWaves));
    return std::max(1, std::max(divide_up(most, most_splits), fair));
  }
  // One at least: somebody writes the rows of a sequence without keys.
  constexpr int32_t splits(int32_t share_tiles, int32_t tiles) const {
    return share_tiles == 0 ? even_splits : std::max(1, divide_up(tiles, share_tiles));
  }
  // Whatever the lengths.
  constexpr int32_t most_shares(int32_t batch) const {
    return std::max(batch * even_splits, wave_shares * kWaves + batch);
  }

  static constexpr int32_t kWaves = 4;

 private:
  static constexpr int32_t divide_up(int32_t value, int32_t by) { return (value + by - 1) / by; }
};

}  // namespace wh::cuda
