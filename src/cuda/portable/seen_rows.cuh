// What the rows of a warp's accumulators see.
#pragma once

#include "cuda/common/scores.cuh"
#include "cuda/portable/kernel.h"

namespace wh::cuda::portable {

// Of a thread's two rows of 16, eight apart. Computed anew for each tile: kept, they would cost 16
// registers that the sums need.
__device__ __forceinline__ void see_rows(const PortableArgs& args, const PackedItem& item,
                                         int first_row, ScoreRow (&rows)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {  // rows past the last one follow it, and are not stored
    const PackedRow at(args.attention, args.rows, item, min(first_row + 8 * r, item.rows - 1));
    rows[r] = score_row(args.attention, item.sequence, at.head, at.query);
  }
}

}  // namespace wh::cuda::portable
