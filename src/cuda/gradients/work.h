// What a backward kernel's work costs, for the planner: by the rows that its blocks own and the
// rate at which it multiplies.
#pragma once

#include <cstdint>

#include "cuda/common/head_dims.h"
#include "plan/kernel.h"

namespace wh::cuda {

struct BackwardWork {
  HeadDims dims;             // computed, padding included
  int query_rows, key_rows;  // of a block of either side
  double share;              // of the card's dense 16-bit tensor rate
  int block_sms = 1;         // that share a block's work
};

double backward_us(const Query& query, const BackwardWork& work);

// Config::step_tiles, of blocks of both sides, and how long such a step takes.
int64_t backward_step_tiles(const Query& query, const BackwardWork& work);
double backward_step_us(const Query& query, const BackwardWork& work, int64_t step_tiles);

}  // namespace wh::cuda
