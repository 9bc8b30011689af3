// What the backward kernels read of a problem, and the two steps that they share: the gradients of
// sinks, and what NaN and infinity do to sums that were made without them.
#pragma once

#include <cuda_runtime_api.h>

#include "core/status.h"
#include "cuda/common/attention_args.h"

namespace wh::cuda {

struct GradientArgs {
  AttentionArgs attention;  // whose out and log-sum-exp are inputs
  Scores scores;
  int32_t heads_kv;
  const void* q;
  const void* k;
  const void* d_out;
  void* dq;
  void* dk;
  void* dv;        // null: v lies in k, and dk has its part
  float* d_sinks;  // null: there are none
  int64_t stride_q[4], stride_k[4], stride_d_out[4], stride_dq[4], stride_dk[4], stride_dv[4];
};

// Needs fits_int32().
GradientArgs gradient_args(const Problem& problem, const Tensors& tensors);

// d_sinks from each row's part, numbered as log-sum-exps are, in a fixed order.
Status launch_sink_gradients(const GradientArgs& args, const float* of_rows, cudaStream_t stream);

// A weight of 0 does not hide a NaN, so products read 0 in the place of what is not finite;
// *dropped is not 0 if there was any. Behind the last product this gives it to what sees it: an
// infinite or NaN element of k or q makes scores that are no numbers, or weights of 0 times
// infinity, so that dq and dk are NaN; that of d_out is added to dv.
Status launch_restore(const GradientArgs& args, Dtype dtype, const int32_t* dropped,
                      cudaStream_t stream);

}  // namespace wh::cuda
