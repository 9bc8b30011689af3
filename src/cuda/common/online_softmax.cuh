// Softmax over tiles of scores that arrive one after another, in the layout of wgmma's and mma's
// accumulators: a thread holds columns 8 i + 2 (lane % 4) + {0, 1} of rows lane / 4 and lane / 4
// + 8.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/common/row_weight.h"
#include "cuda/ptx/math.cuh"

namespace wh::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// The natural logarithm of the denominator; minus infinity where a row has seen nothing.
__device__ __forceinline__ float log_sum_exp(RowWeight weight) {
  return (weight.largest + ptx::log2_approx(weight.sum)) * kLn2;
}

struct OnlineSoftmax {
  float largest[2] = {-INFINITY, -INFINITY};  // over the quad, in units of the scores
  float sum[2] = {0, 0};                      // of this thread's columns alone, until finish()
  float correction[2] = {1, 1};               // of what was summed before the last tile

  // The largest score of row r so far, and in `s`.
  template <int kCount>
  __device__ __forceinline__ float top(const float (&s)[kCount], int r) const {
    float top = largest[r];
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i)
      top = fmaxf(top, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    return fmaxf(top, __shfl_xor_sync(~0u, top, 2));
  }

  // A row that has seen nothing yet must not compute inf - inf.
  static __device__ __forceinline__ float shift_of(float top, float scale_log2) {
    return top == -INFINITY ? 0.0f : __fmul_rn(top, scale_log2);
  }

  // Makes `top` the largest score of row r. The products are rounded before they are subtracted:
  // the correction is exactly 1 where the largest score stays, and fits weights of either shift.
  __device__ __forceinline__ void raise(int r, float top, float scale_log2) {
    const float shift = shift_of(top, scale_log2);
    correction[r] = ptx::exp2_approx(__fmul_rn(largest[r], scale_log2) - shift);
    largest[r] = top;
    sum[r] *= correction[r];
  }

  // Turns scores of row r into unnormalised weights 2^((s - largest) * scale_log2).
  template <int kCount>
  __device__ __forceinline__ void weigh(float (&s)[kCount], int r, float scale_log2) {
    const float shift = shift_of(largest[r], scale_log2);
    float added = 0;
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      float& a = s[4 * i + 2 * r];
      float& b = s[4 * i + 2 * r + 1];
      a = ptx::exp2_approx(fmaf(a, scale_log2, -shift));
      b = ptx::exp2_approx(fmaf(b, scale_log2, -shift));
      added += a + b;
    }
    sum[r] += added;
  }

  template <int kCount>
  __device__ __forceinline__ void update(float (&s)[kCount], float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      raise(r, top(s, r), scale_log2);
      weigh(s, r, scale_log2);
    }
  }

  // Adds row r's sink (minus infinity: none) and leaves in correction[r] what normalises the sums
  // of V: 0 where a row has seen nothing.
  __device__ __forceinline__ RowWeight finish(int r, float scale_log2, float sink) {
    float total = sum[r];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    const float old_shift = __fmul_rn(largest[r], scale_log2);
    const float shift = fmaxf(old_shift, sink * kLog2E);
    if (shift == -INFINITY && total == 0) {  // and not NaN
      correction[r] = 0;
      return {-INFINITY, 0};
    }
    const float rescale = ptx::exp2_approx(old_shift - shift);
    total = fmaf(total, rescale, ptx::exp2_approx(fmaf(sink, kLog2E, -shift)));
    correction[r] = total == 0 ? 0 : rescale / total;
    return {shift, total};
  }
};

}  // namespace wh::cuda
