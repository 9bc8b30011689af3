// Softmax over tiles of scores that arrive one after another, in the layout of wgmma's and mma's
// accumulators: a thread holds columns 8 i + 2 (lane % 4) + {0, 1} of rows lane / 4 and lane / 4
// + 8.
//
// A weight is 2^(score * scale - shift), one fused instruction a score, with shift = largest *
// scale. `largest` need not be the largest score: it follows only once that is 2^8 times heavier.
// Sums of f32 do not mind, 16-bit weights keep their precision, and almost no tile has anything to
// rescale: that was a tenth to a quarter of the instructions of a tile.
//
// The shift is rounded and the product in the instruction is not: the weight of `largest` is 2^rest
// instead of 1, with |rest| up to half a unit in the last place of the shift. All weights of a row
// and their sum share that factor, so it cancels; but from a shift of some 2^30 on it is no number
// of f32 any more (masks that hold -1e12 answered 0, those with -1e20 NaN). So where a shift is
// larger than any that scores of a model reach, a warp subtracts the largest score first, which
// takes an instruction more a score.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/score_rules.h"
#include "cuda/common/row_weight.h"
#include "cuda/ptx/math.cuh"

namespace wh::cuda {

// The natural logarithm of the denominator; minus infinity where a row has seen nothing.
__device__ __forceinline__ float log_sum_exp(RowWeight weight) {
  return (weight.largest + ptx::log2_approx(weight.sum)) * kLn2;
}

// score * scale_log2 - shift, where `shift` is a rounded product of another score, or of this one.
// What rounding took from this product counts too: weights are fused, so they hold it. From 2^64 on
// it says nothing: two scores of that size are equal or further apart than f32's exponents reach.
__device__ __forceinline__ float exponent_of(float score, float scale_log2, float shift) {
  const float product = __fmul_rn(score, scale_log2);
  const float beside = fmaf(score, scale_log2, -product);
  // Where the products overflow both are infinite.
  const float below = product == shift ? 0.0f : product - shift;
  return fabsf(beside) <= 64 ? below + beside : below;  // and not NaN
}

struct OnlineSoftmax {
  float largest[2] = {-INFINITY, -INFINITY};  // about, over the quad, in units of the scores
  float sum[2] = {0, 0};                      // of this thread's columns alone, until finish()
  float correction[2] = {1, 1};               // of what was summed before the last tile

  // How much heavier than `largest` a score may be, in base 2.
  static constexpr float kHeadroom = 8;
  // Beyond it a warp subtracts first.
  static constexpr float kLargestFusedShift = 0x1p20f;
  // Up to it the weight of `largest` is 2^rest, beyond it exactly 1. Not the same bound: where the
  // two ways meet, from one tile to the next, both leave the same factor.
  static constexpr float kLargestShiftWithRest = 0x1p22f;

  // The largest score of row r in `s`.
  template <int kCount>
  static __device__ __forceinline__ float top(const float (&s)[kCount], int r) {
    float top = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
    for (int i = 1; i < kCount / 4; ++i)
      top = fmaxf(top, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    return fmaxf(top, __shfl_xor_sync(~0u, top, 2));
  }

  // Takes in the largest scores of a tile. May subtract from `s`, which weigh() knows.
  template <int kCount>
  __device__ __forceinline__ void raise(float (&s)[kCount], const float (&tops)[2],
                                        float scale_log2) {
    correction[0] = correction[1] = 1;
    // Computed anew: kept from tile to tile, it would take registers that tiles of 32 rows lack.
    // Where nothing was seen, and where this tile hides all of a row that subtracts, scores of
    // minus infinity are all that is left.
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      shift_[r] = limit_[r] == -INFINITY ? 0.0f : __fmul_rn(largest[r], scale_log2);
    }
    if (!__any_sync(~0u, tops[0] > limit_[0] || tops[1] > limit_[1])) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float old = largest[r];
      largest[r] = fmaxf(old, tops[r]);
      // A row that has seen nothing yet must not compute inf - inf.
      const float base = largest[r] == -INFINITY ? 0.0f : largest[r];
      const float shift = __fmul_rn(base, scale_log2), beside = rest(base, scale_log2);
      const bool is_far = fabsf(shift) > kLargestFusedShift;
      limit_[r] = is_far ? -INFINITY : largest[r] + __fdividef(kHeadroom, scale_log2);
      shift_[r] = is_far ? -beside : shift;
      const float less = is_far ? base : 0.0f;
#pragma unroll
      for (int i = 0; i < kCount / 4; ++i) {
        s[4 * i + 2 * r] -= less;
        s[4 * i + 2 * r + 1] -= less;
      }
      // Exactly 1 where nothing rises.
      if (old < largest[r]) {
        correction[r] =
            ptx::exp2_approx(fmaf(old - base, scale_log2, beside - rest(old, scale_log2)));
        sum[r] *= correction[r];
      }
    }
  }
  // Whether the correction is not 1 in some row of the warp.
  __device__ __forceinline__ bool corrects() const {
    return __any_sync(~0u, correction[0] != 1 || correction[1] != 1);
  }

  // Both rows' largest scores before either's exponentials: one after the other, a warp would wait
  // twice for the shuffles.
  template <int kCount>
  __device__ __forceinline__ void raise(float (&s)[kCount], float scale_log2) {
    const float tops[2] = {top(s, 0), top(s, 1)};
    raise(s, tops, scale_log2);
  }

  // Turns the scores that were raised into unnormalised weights, times 2^kLift.
  template <int kLift = 0, int kCount>
  __device__ __forceinline__ void weigh(float (&s)[kCount], float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (kLift != 0) shift_[r] -= kLift;
      float added = 0;
#pragma unroll
      for (int i = 0; i < kCount / 4; ++i) {
        float& a = s[4 * i + 2 * r];
        float& b = s[4 * i + 2 * r + 1];
        a = ptx::exp2_approx(fmaf(a, scale_log2, -shift_[r]));
        b = ptx::exp2_approx(fmaf(b, scale_log2, -shift_[r]));
        added += a + b;
      }
      sum[r] += added;
    }
  }

  // The weight of a score of row r, as in the sums: for what is added again one by one.
  __device__ __forceinline__ float weight(float score, int r, float scale_log2) const {
    const float base = largest[r] == -INFINITY ? 0.0f : largest[r];
    return ptx::exp2_approx(fmaf(score - base, scale_log2, rest(base, scale_log2)));
  }

  // Adds row r's sink (minus infinity: none) and leaves in correction[r] what normalises the sums
  // of V: 0 where a row has seen nothing.
  __device__ __forceinline__ RowWeight finish(int r, float scale_log2, float sink) {
    float total = sum[r];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    const float largest_log2 = __fmul_rn(largest[r], scale_log2);
    const float sink_log2 = __fmul_rn(sink, kLog2E);
    const float shift = fmaxf(largest_log2, sink_log2);
    if (shift == -INFINITY && total == 0) {  // and not NaN
      correction[r] = 0;
      return {-INFINITY, 0};
    }
    // Where the product overflows both are infinite.
    const float below = largest_log2 == shift ? 0.0f : largest_log2 - shift;
    const float rescale = ptx::exp2_approx(below + unit(r, scale_log2));
    total = fmaf(total, rescale, ptx::exp2_approx(exponent_of(sink, kLog2E, shift)));
    correction[r] = total == 0 ? 0 : rescale / total;
    return {shift, total};
  }

 private:
  // The exponent of the weight of the largest score.
  static __device__ __forceinline__ float rest(float largest, float scale_log2) {
    const float shift = __fmul_rn(largest, scale_log2);
    return fabsf(shift) <= kLargestShiftWithRest ? fmaf(largest, scale_log2, -shift) : 0.0f;
  }

  // In which power of 2 the sums of row r are counted, seen from 2^(rounded shift): not 0 where the
  // largest weight is 1. Two parts of a row whose largest scores differ by less than 2^64 merge as
  // they should; beyond it, f32 has no such scores.
  __device__ __forceinline__ float unit(int r, float scale_log2) const {
    const float shift = __fmul_rn(largest[r], scale_log2);
    const float beside = fmaf(largest[r], scale_log2, -shift);
    return fabsf(shift) > kLargestShiftWithRest && fabsf(beside) <= 64 ? beside : 0.0f;
  }

  float shift_[2];                           // of exponents, from raise() to weigh()
  float limit_[2] = {-INFINITY, -INFINITY};  // the largest score that changes nothing
};

}  // namespace wh::cuda
