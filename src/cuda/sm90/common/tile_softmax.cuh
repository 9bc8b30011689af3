// The softmax step of the kernels for Hopper: of the two rows of a consumer thread, one tile of
// keys after another.
#pragma once

#include <cstdint>

#include "cuda/common/online_softmax.cuh"
#include "cuda/common/scores.cuh"
#include "cuda/ptx/math.cuh"

namespace wh::cuda {

template <typename T>
struct TileSoftmax {
  const AttentionArgs& args;
  Scores scores;     // a constant where a kernel is compiled for each
  float scale_log2;  // of scores in the exponent; transformed ones are in natural units
  ScoreRow rows[2];
  OnlineSoftmax online;

  __device__ __forceinline__ TileSoftmax(const AttentionArgs& args, Scores scores)
      : args(args),
        scores(scores),
        scale_log2((scores == Scores::kPlain ? args.scale : 1) * kLog2E) {}

  // The first half: transforms, hides what rows must not see, takes in the largest scores. `hides`
  // is whether some row does not see some key of the tile.
  template <int kCount>
  __device__ __forceinline__ void raise(float (&s)[kCount], int32_t tile_key, bool hides) {
    if (scores != Scores::kPlain) transform_scores(s, args);
    if (hides) {
      if (scores == Scores::kMasked) {
        mask_scores<T>(s, args, rows, tile_key);
      } else {
        hide_keys(s, rows, tile_key);
      }
    }
    online.raise(s, scale_log2);
  }

  // The second half: the weights, times 2^kLift.
  template <int kLift = 0, int kCount>
  __device__ __forceinline__ void weigh(float (&s)[kCount]) {
    online.weigh<kLift>(s, scale_log2);
  }
  template <int kCount>
  static __device__ __forceinline__ void pack(const float (&s)[kCount], uint32_t (&p)[kCount / 2]) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) p[i] = ptx::pack<T>(s[2 * i], s[2 * i + 1]);
  }

  // Sums of V from before the last tile.
  template <int kCount>
  __device__ __forceinline__ void correct(float (&o)[kCount]) const {
    if (!online.corrects()) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) o[i] *= online.correction[i / 2 % 2];
  }

  // Takes 2^kLift out of the sums of weights again. Those of V keep it.
  template <int kLift>
  __device__ __forceinline__ void lower() {
    if constexpr (kLift == 0) return;
#pragma unroll
    for (float& sum : online.sum) sum *= 1.0f / (1 << kLift);
  }

  // Row r's weight with its sink; norm(r) then normalises its sums.
  __device__ __forceinline__ RowWeight finish(int r, float sink) {
    return online.finish(r, scale_log2, sink);
  }
  __device__ __forceinline__ float norm(int r) const { return online.correction[r]; }
};

}  // namespace wh::cuda
