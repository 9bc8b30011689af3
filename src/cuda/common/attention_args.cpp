#include "cuda/common/attention_args.h"

#include <algorithm>

#include "core/score_rules.h"

namespace wh::cuda {

bool fits_int32(const Problem& p) {
  const int64_t extents[] = {p.batch * p.heads_q, p.len_q,   p.len_k,
                             p.total_q,           p.total_k, p.page_size};
  return *std::ranges::max_element(extents) <= kMaxExtent && p.total_q * p.group() <= kMaxExtent;
}

Scores scores_of(const Problem& p) {
  if (p.mask != MaskKind::kNone) return Scores::kMasked;
  // A scale this small could turn a hidden key's minus infinity into 0 * inf.
  constexpr float kLeastScale = 1e-30f;
  return p.softcap > 0 || p.scale < kLeastScale ? Scores::kTransformed : Scores::kPlain;
}

AttentionArgs attention_args(const Problem& p, const Tensors& t) {
  AttentionArgs args{};
  const Sequences sequences = sequences_of(p, t);
  args.len_q = static_cast<int32_t>(sequences.len_q);
  args.len_k = static_cast<int32_t>(sequences.len_k);
  args.total_q = static_cast<int32_t>(sequences.total_q);
  args.total_k = static_cast<int32_t>(sequences.total_k);
  args.query_offsets = sequences.query_offsets;
  args.key_offsets = sequences.key_offsets;
  args.key_lengths = sequences.key_lengths;
  args.key_starts = sequences.key_starts;
  args.batch = static_cast<int32_t>(p.batch);
  args.heads_q = static_cast<int32_t>(p.heads_q);
  args.group = static_cast<int32_t>(p.group());
  args.dim_qk = static_cast<int32_t>(p.dim_qk);
  args.dim_v = static_cast<int32_t>(p.dim_v);
  args.causal = p.causal;
  // In f32 q's type is f32: one kind less for the kernels.
  const bool is_f32 = p.mask == MaskKind::kAdditiveQ && p.dtype_q == Dtype::kF32;
  args.mask_kind = is_f32 ? MaskKind::kAdditiveF32 : p.mask;
  // A window beyond the longest length hides nothing more.
  args.window_left = static_cast<int32_t>(std::min(p.window_left, kMaxExtent));
  args.window_right = static_cast<int32_t>(std::min(keys_right_of_diagonal(p), kMaxExtent));
  args.scale = p.scale;
  args.softcap = p.softcap;
  args.v = t.v;
  args.out = t.out;
  args.mask = t.mask;
  args.sinks = t.sinks;
  args.log_sum_exp = t.log_sum_exp;
  std::copy_n(p.stride_v.begin(), 4, args.stride_v);
  std::copy_n(p.stride_out.begin(), 4, args.stride_out);
  std::copy_n(p.stride_mask.begin(), 4, args.stride_mask);
  args.page_table = page_table_of(p, t);
  if (p.key_layout == KeyLayout::kPaged) args.page_size = Divisor(p.page_size);
  args.zeros_from = p.key_layout == KeyLayout::kDense ? args.len_k : -1;
  return args;
}

}  // namespace wh::cuda
