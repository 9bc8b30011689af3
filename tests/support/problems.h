// Problems that several tests plan for.
#pragma once

#include "core/problem.h"

namespace wh {

// 2048 queries of a long prompt against the keys so far, of a model with wide heads.
inline Problem chunk(int64_t len_k, Dtype dtype, Device device) {
  Problem p;
  p.device = device;
  p.dtype_q = p.dtype_kv = dtype;
  p.heads_q = 64;
  p.heads_kv = 2;
  p.len_q = 2048;
  p.len_k = len_k;
  p.dim_qk = p.dim_v = 256;
  p.causal = Causal::kBottomRight;
  set_dense(p);
  return p;
}

// 300 queries and keys, 8 heads over 2.
inline Problem square_of_300(int64_t dim_qk, int64_t dim_v, Dtype dtype, Device device) {
  Problem p;
  p.device = device;
  p.dtype_q = p.dtype_kv = dtype;
  p.heads_q = 8;
  p.heads_kv = 2;
  p.len_q = p.len_k = 300;
  p.dim_qk = dim_qk;
  p.dim_v = dim_v;
  set_dense(p);
  return p;
}

// The same problem's backward pass, whose gradients lie as their tensors do.
inline Problem backward_of(Problem p) {
  p.pass = Pass::kBackward;
  p.stride_d_out = p.stride_out;
  p.stride_dq = p.stride_q;
  p.stride_dk = p.stride_k;
  if (!p.values_in_keys) p.stride_dv = p.stride_v;
  return p;
}

}  // namespace wh
