// cuda_portable, the running side.
#pragma once

#include "core/kv_tensor.h"
#include "core/status.h"
#include "cuda/combine/combine.h"
#include "cuda/common/attention_args.h"
#include "cuda/common/packed_rows.h"
#include "cuda/portable/tiles.h"

namespace wh {
struct Launch;
}

namespace wh::cuda {

struct PortableArgs {
  AttentionArgs attention;
  Scores scores;
  int32_t last_item;  // of this launch, which takes items from there down
  const void* q;
  const void* k;
  int64_t stride_q[4], stride_k[4];  // of k's batch or page, head, token, element
  // K and V where few_rows.cuh reads them, and the types of q and out where those are quantised.
  KvTensor stored_k, stored_v;
  Dtype dtype_q, dtype_out;
  // Rows that can be copied 16 bytes at a time; others are element by element.
  bool q_is_whole, k_is_whole, v_is_whole;
  bool out_is_whole;  // pairs of elements can be stored at once
  PackedRows rows;
  Partials partials;
  // Whether some tile of keys lies in several pages. Others have their rows one stride apart.
  bool pages_cut_tiles;
};

// The kernel compiled for these; instance.cu.in defines them.
template <int kDimQk, int kDimV, Dtype kDtype, SharedMemory kMemory>
const void* portable_instance(bool pages_cut_tiles);

Status run_portable(const Launch& launch);

}  // namespace wh::cuda
