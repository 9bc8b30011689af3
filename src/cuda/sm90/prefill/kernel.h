// sm90_prefill, the running side.
#pragma once

#include <cuda.h>

#include "cuda/common/attention_args.h"
#include "cuda/common/tile_order.h"
#include "cuda/sm90/prefill/tiles.h"
#include "plan/kernel.h"

namespace wh::cuda {

struct PrefillMaps {
  CUtensorMap q;  // [batch, heads_kv, query, head in group, dim], a box is one panel of a tile
  CUtensorMap k;  // [batch, heads_kv, key, dim]
  CUtensorMap v;
};

// The kernel compiled for these dimensions; instance.cu.in defines them.
template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores>
const void* prefill_instance();

Status run_prefill(const Launch& launch);

}  // namespace wh::cuda
