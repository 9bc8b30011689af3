// Scales of codes in the kernels for many queries.
#pragma once

#include "core/kv_tensor.h"
#include "cuda/common/attention_args.h"
#include "cuda/ptx/math.cuh"
#include "cuda/sm90/common/tile_walk.cuh"
#include "cuda/sm90/common/widen.cuh"

namespace wh::cuda {

template <typename Work>
__device__ __forceinline__ KvPlace head_of(const AttentionArgs& args, const Work& w) {
  return {0, w.at.first_head / args.group, 0, w.sequence.batch_idx};
}

// Of scores in the exponent, before any scale of K.
template <Scores kScores>
__device__ __forceinline__ float scale_log2_of(const AttentionArgs& args) {
  return (kScores == Scores::kPlain ? args.scale : 1) * kLog2E;
}

// Whether scores are multiplied by scales of keys. What all keys share goes into the exponent's,
// where that stays a positive number which f32 holds with room to spare.
template <Scores kScores, typename Work>
__device__ __forceinline__ bool multiplies_scores(const AttentionArgs& args, const KvTensor& k,
                                                  const Work& w) {
  if (has_token_scales(k)) return true;
  if (k.scales == Scales::kNone) return false;
  if (kScores != Scores::kPlain) return true;
  const float folded = scale_log2_of<kScores>(args) * k.scale(head_of(args, w), 0);
  return !(folded > 0x1p-60f && folded < 0x1p60f);
}

// Scores or weights of a tile by the scales of its keys.
template <int kCount>
__device__ __forceinline__ void multiply_by_scales(float (&s)[kCount], const void* scales) {
  const auto* pairs = static_cast<const float2*>(scales);
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    const float2 pair = pairs[4 * i + threadIdx.x % 4];
    s[4 * i] *= pair.x;
    s[4 * i + 1] *= pair.y;
    s[4 * i + 2] *= pair.x;
    s[4 * i + 3] *= pair.y;
  }
}

}  // namespace wh::cuda
