// cuda_portable over quantised keys and values on the tensor cores, q in 16 bits. The planner's
// view.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/kv_tensor.h"
#include "core/quantised.h"

namespace wh::cuda {

// Who computes what in a block.
struct CodeTile {
  static constexpr int kItemBytes = 128;  // for what a block works on
  static constexpr int kMostStages = 4;

  int dim_v, rows;

  // Of 16 rows, a warp: 32 read each fragment of K and V, and widen it, for two products.
  constexpr int row_tiles() const { return rows >= 128 ? 2 : 1; }
  constexpr int row_warps() const { return rows / (16 * row_tiles()); }
  // Warps that compute the same scores and sum different columns of V.
  constexpr int column_warps() const { return dim_v > 256 ? dim_v / 256 : 1; }
  constexpr int columns() const { return dim_v / column_warps(); }  // of V, a warp
  // Warps of the same rows that take different keys, and merge at the end: decode.
  constexpr int key_warps() const { return row_warps() == 1 ? 4 / column_warps() : 1; }
  constexpr int warps() const { return row_warps() * key_warps() * column_warps(); }
  constexpr int threads() const { return 32 * warps(); }
  constexpr int slice_keys() const { return key_warps() > 1 ? 16 : 32; }  // a warp
  constexpr int keys() const { return slice_keys() * key_warps(); }
  // What warps leave at the end, over everything else: for each other, or eight rows to be stored.
  constexpr int merge_bytes() const {
    return key_warps() == 1 ? warps() * 8 * columns() * 4 : key_warps() * rows * (dim_v * 4 + 8);
  }
  // Blocks that an SM holds by its registers.
  constexpr int resident() const { return threads() <= 128 ? 2 : 1; }
};

// Bytes between rows of codes in shared memory, an odd number of 16: a warp reads words of eight
// rows at once, or of four rows two apart, each from a bank of its own.
constexpr int code_pitch(Quantised format, int64_t columns) {
  const auto bytes = static_cast<int>(stored_bytes(format, Dtype::kF32, columns));
  return ((bytes + 15) / 16 | 1) * 16;
}

// What a block has in shared memory: q in parts of bf16, and a ring of tiles of codes.
struct CodeLayout {
  int parts;    // of q, which add up to it: 1 of bf16, 2 of f16, 3 with K's scales of channels
  int parts_p;  // of the weights: f16 is more than one bf16 holds
  int padded_qk;
  int pitch_q;  // elements
  int pitch_k, pitch_v;
  int stages;  // at least 2, or there is no room
  int bytes;

  constexpr int queries_bytes(int rows) const { return parts * rows * pitch_q * 2; }
  constexpr int stage_bytes(int keys) const { return keys * (pitch_k + pitch_v + 8); }
};
inline CodeLayout code_layout(const Problem& p, const CodeTile& tile, int64_t shared_bytes) {
  CodeLayout layout{};
  layout.parts_p = p.dtype_q == Dtype::kBf16 ? 1 : 2;
  layout.parts = p.scales_k == Scales::kChannel ? 3 : layout.parts_p;
  layout.padded_qk = static_cast<int>((p.dim_qk + 31) / 32 * 32);
  layout.pitch_q = layout.padded_qk + 8;
  layout.pitch_k = code_pitch(p.quantised_k, layout.padded_qk);
  layout.pitch_v = code_pitch(p.values_in_keys ? p.quantised_k : p.quantised_v, tile.dim_v);
  const int fixed = layout.queries_bytes(tile.rows) + CodeTile::kItemBytes;
  const int stage = layout.stage_bytes(tile.keys());
  // Two blocks on an SM, each of which the card charges 1 KB more, where that leaves three stages.
  const auto all = static_cast<int>(shared_bytes);
  const int half = (all - 1024) / 2;
  const int budget = tile.resident() > 1 && half >= fixed + 3 * stage ? half : all;
  layout.stages = std::min(CodeTile::kMostStages, std::max(0, budget - fixed) / stage);
  layout.bytes = std::max(fixed + layout.stages * stage, tile.merge_bytes() + CodeTile::kItemBytes);
  return layout;
}

template <int kDimV, int kRows>
const void* code_tiles_instance(bool);

}  // namespace wh::cuda
