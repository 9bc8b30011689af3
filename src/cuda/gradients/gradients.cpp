#include "cuda/gradients/gradients.h"

#include <algorithm>

namespace wh::cuda {

GradientArgs gradient_args(const Problem& p, const Tensors& t) {
  GradientArgs args{};
  args.attention = attention_args(p, t);
  args.scores = scores_of(p);
  args.heads_kv = static_cast<int32_t>(p.heads_kv);
  args.q = t.q;
  args.k = t.k;
  args.d_out = t.d_out;
  args.dq = t.dq;
  args.dk = t.dk;
  args.dv = t.dv;
  args.d_sinks = t.d_sinks;
  std::copy_n(p.stride_q.begin(), 4, args.stride_q);
  std::copy_n(p.stride_k.begin(), 4, args.stride_k);
  std::copy_n(p.stride_d_out.begin(), 4, args.stride_d_out);
  std::copy_n(p.stride_dq.begin(), 4, args.stride_dq);
  std::copy_n(p.stride_dk.begin(), 4, args.stride_dk);
  std::copy_n(p.stride_dv.begin(), 4, args.stride_dv);
  return args;
}

}  // namespace wh::cuda
