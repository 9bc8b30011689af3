// cuda_portable for few query rows in f32: decode, on the CUDA cores. The planner's view.
#pragma once

namespace wh::cuda {

// How a block reads: teams of lanes take some keys each and keep a row of K and of V whole.
struct FewRowsTile {
  static constexpr int kThreads = 128;
  static constexpr int kStages = 3;
  static constexpr int kItemBytes = 128;  // for what a block works on
  static constexpr int kKeys = 32;        // what splits are counted in: whole steps of all teams

  int dim, rows;

  constexpr int lanes() const { return dim < 128 ? dim / 4 : 32; }  // of a team, four columns each
  constexpr int pieces() const { return dim / 4 / lanes(); }  // of four columns, a lane and row
  constexpr int teams() const { return kThreads / lanes(); }
  // Keys of a team's step. A lane ends up with one score, so there are at most as many as lanes.
  constexpr int step_keys() const { return lanes() / rows < 4 ? lanes() / rows : 4; }
  constexpr int stage_bytes() const { return 2 * step_keys() * pieces() * kThreads * 16; }
  constexpr int merge_bytes() const { return teams() * rows * (dim + 3) * 4; }
  // Blocks that an SM holds by its registers: Q, the sums, and what K, V and addresses take.
  constexpr int resident() const { return 512 / (64 + 8 * rows * pieces()); }
  // The ring of K and V, and at the end what the teams merge.
  constexpr int ring_bytes() const {
    const int stages = kStages * stage_bytes();
    return (stages > merge_bytes() ? stages : merge_bytes() + 15) / 16 * 16;
  }
  constexpr int shared_bytes() const { return ring_bytes() + kItemBytes; }
};

template <int kDim, int kRows>
const void* few_rows_instance(bool pages_cut_tiles);
// The same over quantised keys and values, in whatever layout.
template <int kDim, int kRows>
const void* code_rows_instance(bool pages_cut_tiles);

}  // namespace wh::cuda
