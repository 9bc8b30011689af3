// The two products of a tile on tensor cores, for 16-bit elements and for f32. Operands lie in
// shared memory with padded rows; a warp has 16 query rows, or 32.
//
// f32 runs as 3xTF32: each factor is the sum of two TF32 numbers, and three of the four products
// are added, the small ones first (Ootomo and Yokota, "Recovering single precision accuracy from
// Tensor Cores", 2022). Tensor cores cut instead of rounding when they add: sums longer than a few
// products are therefore added outside of them, or the error would grow with the keys.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/mma.cuh"

namespace wh::cuda::portable {

// Accumulators of one 16 x 8 tile among those of a warp.
template <int kCount>
__device__ __forceinline__ float (&quad(float (&s)[kCount], int tile))[4] {
  return reinterpret_cast<float(&)[4]>(s[4 * tile]);
}

// A matrix in shared memory.
template <typename T>
struct SharedRows {
  T* data;
  int pitch;  // elements

  __device__ __forceinline__ T* at(int row, int column) const {
    return data + row * pitch + column;
  }
  // For ldmatrix: the address that this lane gives for 16 rows x 16 columns from there on, in the
  // order of mma's first operand; transposed, it is that of the second one for two tiles of
  // columns.
  __device__ __forceinline__ uint32_t square_address(int row, int column) const {
    const int lane = threadIdx.x % 32;
    return ptx::shared_address(at(row + lane % 16, column + lane / 16 * 8));
  }
  // The same of the second operand for two tiles of rows, of which the first two matrices are the
  // first tile. mma takes it from two neighbouring registers: in the order above each product costs
  // two moves.
  __device__ __forceinline__ uint32_t pair_address(int row, int column) const {
    const int lane = threadIdx.x % 32;
    return ptx::shared_address(at(row + lane / 16 * 8 + lane % 8, column + lane / 8 % 2 * 8));
  }
};

template <typename T>
struct Products {
  // s[m] += Q rows 16 m.. times the K rows of kTiles tiles of 8.
  template <int kDim, int kRowTiles, int kTiles>
  static __device__ __forceinline__ void scores(float (&s)[kRowTiles][4 * kTiles],
                                                const SharedRows<T>& q, const SharedRows<T>& k) {
    uint32_t q_at[kRowTiles];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) q_at[m] = q.square_address(16 * m, 0);
    // 16 columns of two tiles of keys at once: 32 columns of one take eight registers more, which
    // 64 keys of 128-wide heads do not have. Of a tile alone 16 columns too: 32 would end past the
    // last row of K, where V may be on its way.
    const uint32_t k_at = k.pair_address(0, 0);
    // Eight are 1 to 3 % faster, but some narrower ones would spill.
    constexpr int kUnroll = kDim < 256 ? 4 : 8;
#pragma unroll kUnroll
    for (int column = 0; column < kDim; column += 16) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) ptx::ldmatrix(a[m], q_at[m] + column * 2);
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += 2) {
        uint32_t b[kTiles > 1 ? 4 : 2];
        ptx::ldmatrix(b, k_at + (tile * 8 * k.pitch + column) * 2);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          ptx::mma<T>(quad(s[m], tile), a[m], b[0], b[1]);
          if constexpr (kTiles > 1) ptx::mma<T>(quad(s[m], tile + 1), a[m], b[2], b[3]);
        }
      }
    }
  }

  // A first operand: 16 rows x kStep columns.
  static constexpr int kStep = 16;
  struct First {
    uint32_t a[4];

    __device__ __forceinline__ void set(const float* accumulators) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = ptx::pack<T>(accumulators[2 * i], accumulators[2 * i + 1]);
      }
    }
    __device__ __forceinline__ void load(const SharedRows<T>& rows, int column) {
      ptx::ldmatrix(a, rows.square_address(0, column));
    }
  };

  // o[m] = o[m] * correction + weights[m] times V.
  template <int kRowTiles, int kSteps, int kColumns>
  static __device__ __forceinline__ void values(float (&o)[kRowTiles][kColumns / 2],
                                                const float (&correction)[kRowTiles][2],
                                                First (&weights)[kRowTiles][kSteps],
                                                const SharedRows<T>& v) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) o[m][i] *= correction[m][i / 2 % 2];
    }
    const uint32_t v_at = v.square_address(0, 0);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int column = 0; column < kColumns; column += 16) {
        uint32_t b[4];
        ptx::ldmatrix_transposed(b, v_at + (step * kStep * v.pitch + column) * 2);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          ptx::mma<T>(quad(o[m], column / 8), weights[m][step].a, b[0], b[1]);
          ptx::mma<T>(quad(o[m], column / 8 + 1), weights[m][step].a, b[2], b[3]);
        }
      }
    }
  }

  // Leaves a thread's weights of `kTiles` tiles of keys for the other warps of its rows.
  template <int kTiles>
  static __device__ __forceinline__ void share(const float (&s)[4 * kTiles],
                                               const SharedRows<T>& rows) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      *reinterpret_cast<uint32_t*>(rows.at(lane / 4 + i % 2 * 8, i / 2 * 8 + lane % 4 * 2)) =
          ptx::pack<T>(s[2 * i], s[2 * i + 1]);
    }
  }
};

// A product of TF32 takes 8 columns of Q and K in any order that both share: slots t and t + 4 of
// the instruction are columns 2 t and 2 t + 1 here, which makes one load of them, and lets the
// accumulators of the scores serve as weights.
template <>
struct Products<float> {
  struct Split {
    uint32_t high, low;
    // cvt.rna.tf32 looks for NaN and infinity first: by it both halves take eight instructions on
    // sm_90. Of those two `low` is NaN either way. What `low` has beyond TF32 the tensor cores
    // ignore.
    __device__ __forceinline__ explicit Split(float x) {
      high = (__float_as_uint(x) + 0x1000) & 0xffffe000;
      low = __float_as_uint(x - __uint_as_float(high));
    }
    Split() = default;
  };

  static constexpr int kStep = 8;
  struct First {
    uint32_t high[4], low[4];

    __device__ __forceinline__ void set(const float* accumulators) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Split split(accumulators[i]);
        high[i % 2 * 2 + i / 2] = split.high;
        low[i % 2 * 2 + i / 2] = split.low;
      }
    }
    __device__ __forceinline__ void load(const SharedRows<float>& rows, int column) {
      const int lane = threadIdx.x % 32;
      const auto pair = [&](int row) {
        return *reinterpret_cast<const float2*>(rows.at(row + lane / 4, column + lane % 4 * 2));
      };
      const float2 upper = pair(0), lower = pair(8);
      const float accumulators[4] = {upper.x, upper.y, lower.x, lower.y};
      set(accumulators);
    }
  };

  // d[i] += a times the second operand b[i]. Three products into one sum wait for each other: those
  // of all sums take turns.
  template <int kCount>
  static __device__ __forceinline__ void multiply(float (&d)[kCount][4], const First& a,
                                                  const Split (&b)[kCount][2]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) ptx::mma_tf32(d[i], a.low, b[i][0].high, b[i][1].high);
#pragma unroll
    for (int i = 0; i < kCount; ++i) ptx::mma_tf32(d[i], a.high, b[i][0].low, b[i][1].low);
#pragma unroll
    for (int i = 0; i < kCount; ++i) ptx::mma_tf32(d[i], a.high, b[i][0].high, b[i][1].high);
  }

  template <int kDim, int kRowTiles, int kTiles>
  static __device__ __forceinline__ void scores(float (&s)[kRowTiles][4 * kTiles],
                                                const SharedRows<float>& q,
                                                const SharedRows<float>& k) {
    static_assert(kRowTiles == 1);
    constexpr int kSumColumns = 64;
    constexpr int kTogether = kTiles < 4 ? kTiles : 4;
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int begin = 0; begin < kDim; begin += kSumColumns) {
      float part[kTiles / kTogether][kTogether][4] = {};
#pragma unroll 2
      for (int column = begin; column < begin + kSumColumns; column += kStep) {
        First a;
        a.load(q, column);
#pragma unroll
        for (int n = 0; n < kTiles / kTogether; ++n) {
          Split b[kTogether][2];
#pragma unroll
          for (int i = 0; i < kTogether; ++i) {
            const float2 pair = *reinterpret_cast<const float2*>(
                k.at(8 * (n * kTogether + i) + lane / 4, column + lane % 4 * 2));
            b[i][0] = Split(pair.x);
            b[i][1] = Split(pair.y);
          }
          multiply(part[n], a, b);
        }
      }
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) {
        s[0][i] += part[i / 4 / kTogether][i / 4 % kTogether][i % 4];
      }
    }
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) sum += s[0][i];
    if (__any_sync(~0u, isnan(sum))) redo_scores<kDim>(s[0], q, k);
  }

  // Scores that are NaN once more, in plain f32: a factor that is infinite, or rounds to infinity
  // in TF32, has no second half. Rare: speed does not matter.
  template <int kDim, int kCount>
  static __device__ __forceinline__ void redo_scores(float (&s)[kCount], const SharedRows<float>& q,
                                                     const SharedRows<float>& k) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!isnan(s[i])) continue;
      const float* q_row = q.at(lane / 4 + i % 4 / 2 * 8, 0);
      const float* k_row = k.at(i / 4 * 8 + lane % 4 * 2 + i % 2, 0);
      float dot = 0;
#pragma unroll 1
      for (int column = 0; column < kDim; ++column) dot = fmaf(q_row[column], k_row[column], dot);
      s[i] = dot;
    }
  }

  template <int kRowTiles, int kSteps, int kColumns>
  static __device__ __forceinline__ void values(float (&o)[kRowTiles][kColumns / 2],
                                                const float (&correction)[kRowTiles][2],
                                                First (&weights)[kRowTiles][kSteps],
                                                const SharedRows<float>& v) {
    static_assert(kRowTiles == 1);
    constexpr int kTogether = 4;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int tile = 0; tile < kColumns / 8; tile += kTogether) {
      float part[kTogether][4] = {};
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        Split b[kTogether][2];
#pragma unroll
        for (int n = 0; n < kTogether; ++n) {
          const float* at = v.at(8 * i + lane % 4 * 2, 8 * (tile + n) + lane / 4);
          b[n][0] = Split(at[0]);
          b[n][1] = Split(at[v.pitch]);
        }
        multiply(part, weights[0][i], b);
      }
#pragma unroll
      for (int i = 0; i < 4 * kTogether; ++i) {
        float& sum = o[0][4 * tile + i];
        sum = fmaf(sum, correction[0][i % 4 / 2], part[i / 4][i % 4]);
      }
    }
  }

  template <int kTiles>
  static __device__ __forceinline__ void share(const float (&s)[4 * kTiles],
                                               const SharedRows<float>& rows) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      *reinterpret_cast<float2*>(rows.at(lane / 4 + i % 2 * 8, i / 2 * 8 + lane % 4 * 2)) =
          make_float2(s[2 * i], s[2 * i + 1]);
    }
  }
};

}  // namespace wh::cuda::portable
