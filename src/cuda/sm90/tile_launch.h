// Running of the kernels that work through tiles of query rows: tensor maps, counter, launch.
#pragma once

#include <cuda.h>

#include <cstddef>

#include "core/status.h"
#include "cuda/common/attention_args.h"
#include "cuda/common/tile_order.h"

namespace wh {
struct Launch;  // the kernels must not be compiled anew when the planner changes
}

namespace wh::cuda {

struct PrefillMaps {
  CUtensorMap q;  // [batch, heads_kv, query, head in group, dim], a box is one panel of a block
  CUtensorMap k;  // [batch, heads_kv, key, dim]
  CUtensorMap v;
};

// Each pair of head dimensions is compiled for two types and three kinds of scores; instance i of a
// kernel is dimensions i / kVariants.
constexpr size_t kVariants = 6;
constexpr Dtype variant_dtype(size_t i) { return i / 3 % 2 == 0 ? Dtype::kF16 : Dtype::kBf16; }
constexpr Scores variant_scores(size_t i) { return static_cast<Scores>(i % 3); }
size_t variant(int dims_index, const Problem& problem);

struct TileLaunch {
  TileOrder order;
  int32_t workers;        // that tiles are dealt to: blocks or clusters
  int32_t block_queries;  // of a tile, that one block loads
  int32_t box_keys;       // rows of a box of K
  int32_t box_values;     // rows of a box of V
  const void* function;
  int32_t threads;
  int32_t shared_bytes;
  int32_t cluster = 1;  // blocks of a worker
};

Status run_tiles(const Launch& launch, const TileLaunch& tiles);

}  // namespace wh::cuda
