// sm90_backward, the running side.
#pragma once

#include <cuda.h>

#include "core/status.h"
#include "cuda/gradients/gradients.h"
#include "cuda/gradients/items.h"
#include "cuda/sm90/backward/tiles.h"

namespace wh {
struct Launch;
}

namespace wh::cuda {

// [batch, heads, length, dim]; a box is one panel.
struct GradientMaps {
  CUtensorMap own_qk, own_v;  // q and d_out, or k and v: of the block's side
  CUtensorMap qk, v;          // of the other side
};

struct GradientBlockArgs {
  GradientArgs gradients;
  BackwardRows rows;
  int32_t tiles;       // of a head of the block's side
  int32_t first_item;  // of this launch
};

// The kernel compiled for these; instance.cu.in instantiates it.
template <Side kSide, int kDimQk, int kDimV, Dtype kDtype, Scores kScores>
const void* sm90_backward_instance();

Status run_sm90_backward(const Launch& launch);

}  // namespace wh::cuda
