// cuda_portable, the running side.
#pragma once

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
  const void* q;
  const void* k;
  int64_t stride_q[4], stride_k[4];
  Scores scores;
  // Rows that can be copied 16 bytes at a time; others are element by element.
  bool q_is_whole, k_is_whole, v_is_whole;
  bool out_is_whole;  // pairs of elements can be stored at once
  PackedRows rows;
  int32_t last_item;  // of this launch, which takes items from there down
  Partials partials;
};

// The kernel compiled for these; instance.cu.in defines them.
template <int kDimQk, int kDimV, Dtype kDtype, SharedMemory kMemory>
const void* portable_instance();

Status run_portable(const Launch& launch);

}  // namespace wh::cuda
