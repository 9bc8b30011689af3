// cuda_unfused, the running side.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/attention_args.h"
#include "cuda/unfused/config.h"

namespace wh::cuda {

Status run_unfused(const Launch& launch);

// The items [first, first + count) of a pass. Strides of q, k and v are the problem's.
struct UnfusedPass {
  AttentionArgs args;
  UnfusedTypes types;
  UnfusedShape shape;
  int64_t first, count;
  int64_t stride_q[4], stride_k[4], stride_v[4], stride_out[4];
  const void* q;
  const void* k;
};

// Copies q, k and v to the workspace, padded with zeros; values of absent keys become zeros.
Status launch_pack(const UnfusedPass& pass, const UnfusedWorkspace& w, cudaStream_t stream);
// Scores to weights exp(s - m), with m and l of each row.
Status launch_softmax(const UnfusedPass& pass, const UnfusedWorkspace& w, cudaStream_t stream);
// out = o / l and log-sum-exp, the sink joined in. Where a present V holds an infinity or NaN the
// sums are made anew, key by key: a weight of 0 does not hide it.
Status launch_finish(const UnfusedPass& pass, const UnfusedWorkspace& w, cudaStream_t stream);

}  // namespace wh::cuda
