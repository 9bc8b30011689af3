// Running of the kernels that work through tiles of query rows: tensor maps, counter, launch.
#pragma once

#include <cuda.h>

#include <cstddef>

#include "core/kv_tensor.h"
#include "core/status.h"
#include "cuda/common/attention_args.h"
#include "cuda/common/tile_order.h"

namespace wh {
struct Launch;  // the kernels must not be compiled anew when the planner changes
}

namespace wh::cuda {

struct PrefillMaps {
  CUtensorMap
      q;  // [batch, heads_kv, query or token, head in group, dim], a box is one panel of a block
  CUtensorMap k;  // [batch or page, heads_kv, key, dim]
  CUtensorMap v;
  int32_t box_keys_log2;  // keys of a box of K and V, where they are in pages
};

// K and V as they are stored, for kernels that read codes: a parameter more.
struct StoredTensors {
  KvTensor k, v;
};

struct TileLaunch {
  TileOrder order;
  int32_t workers;        // that tiles are dealt to: blocks or clusters
  int32_t block_queries;  // of a tile, that one block loads
  int32_t box_keys;       // rows of a box of K that lie side by side
  int32_t box_values;     // and of V
  const void* function;
  int32_t threads;
  int32_t shared_bytes;
  int32_t cluster = 1;  // blocks of a worker
};

Status run_tiles(const Launch& launch, const TileLaunch& tiles);

}  // namespace wh::cuda
