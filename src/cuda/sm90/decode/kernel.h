// sm90_decode, the running side.
#pragma once

#include <cuda.h>

#include "core/kv_tensor.h"
#include "core/status.h"
#include "cuda/combine/combine.h"
#include "cuda/common/attention_args.h"
#include "cuda/common/packed_rows.h"
#include "cuda/sm90/decode/share_rule.h"

namespace wh {
struct Launch;
}

namespace wh::cuda {

// Whether V is the first columns of K (absorbed latent attention); K's tile then serves both
// products and is read once.
enum class Values : int32_t { kOwn, kInKeys };

// How a tensor map is read. A dimension that is broadcast has an extent of 1 there, and a step of
// 0. One box holds all panels of a tile where the dim is whole panels.
struct MapUse {
  int32_t head_step, batch_step;
  int32_t boxes;  // of a tile
};

struct DecodeArgs {
  AttentionArgs attention;
  const void* q;
  const void* k;
  int64_t stride_q[3];  // batch, heads, length
  int64_t stride_k[3];
  Scores scores;
  Values values;
  MapUse use_k, use_v;
  int32_t fresh_keys;  // Limits::fresh_keys
  PackedRows rows;
  Partials partials;
  int32_t box_keys_log2;  // keys of a box of a map, where they are in pages
  ShareRule shares;
  KvTensor stored_k, stored_v;  // as codes, where they are quantised
};

struct DecodeMaps {
  CUtensorMap k;  // [batch or page, heads_kv, key, dim], a box is one panel of a tile, or all
  CUtensorMap v;
};

// The kernel compiled for these dimensions; instance.cu.in defines them.
template <int kDimQk, int kDimV, Dtype kDtype, Layouts kLayouts>
const void* decode_instance();
// Over codes; code_instance.cu.in defines them.
template <int kDimQk, int kDimV, Dtype kDtype, Layouts kLayouts>
const void* decode_code_instance();

Status run_decode(const Launch& launch);

}  // namespace wh::cuda
