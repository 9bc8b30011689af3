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
  // order of mma's first operand; transposed, it is that of the second one for two tiles.
  __device__ __forceinline__ uint32_t square_address(int row, int column) const {
    const int lane = threadIdx.x % 32;
    return ptx::shared_address(at(row + lane % 16, column + lane / 16 * 8));
  }
  // For 8 rows x 32 columns: the second operand of two products.
  __device__ __forceinline__ uint32_t strip_address(int row, int column) const {
    const int lane = threadIdx.x % 32;
    return ptx::shared_address(at(row + lane % 8, column + lane / 8 * 8));
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
    // 64 keys of 128-wide heads do not have.
    const uint32_t k_at = kTiles > 1 ? k.square_address(0, 0) : k.strip_address(0, 0);
#pragma unroll 8
    for (int column = 0; column < kDim; column += 16) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) ptx::ldmatrix(a[m], q_at[m] + column * 2);
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += 2) {
        uint32_t b[4];
        ptx::ldmatrix(b, k_at + (tile * 8 * k.pitch + column) * 2);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          ptx::mma<T>(quad(s[m], tile), a[m], b[0], b[kTiles > 1 ? 2 : 1]);
          if constexpr (kTiles > 1) ptx::mma<T>(quad(s[m], tile + 1), a[m], b[1], b[3]);
        }
      }
    }
  }

  // The weights of a warp's rows, rounded, as first operands.
  template <int kRowTiles, int kKeys>
  struct Weights {
    uint32_t p[kRowTiles][kKeys / 4];

    __device__ __forceinline__ explicit Weights(const float (&s)[kRowTiles][kKeys / 2]) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < kKeys / 4; ++i) p[m][i] = ptx::pack<T>(s[m][2 * i], s[m][2 * i + 1]);
      }
    }
    __device__ __forceinline__ explicit Weights(const SharedRows<T>& rows) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int key = 0; key < kKeys; key += 16) {
          ptx::ldmatrix(step(m, key / 16), rows.square_address(16 * m, key));
        }
      }
    }
    __device__ __forceinline__ uint32_t (&step(int m, int i))[4] {
      return reinterpret_cast<uint32_t(&)[4]>(p[m][4 * i]);
    }
  };

  // o[m] = o[m] * correction + weights times V.
  template <int kRowTiles, int kKeys, int kColumns>
  static __device__ __forceinline__ void values(float (&o)[kRowTiles][kColumns / 2],
                                                const float (&correction)[kRowTiles][2],
                                                Weights<kRowTiles, kKeys>& weights,
                                                const SharedRows<T>& v) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) o[m][i] *= correction[m][i / 2 % 2];
    }
    const uint32_t v_at = v.square_address(0, 0);
#pragma unroll
    for (int key = 0; key < kKeys; key += 16) {
#pragma unroll
      for (int column = 0; column < kColumns; column += 16) {
        uint32_t b[4];
        ptx::ldmatrix_transposed(b, v_at + (key * v.pitch + column) * 2);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          ptx::mma<T>(quad(o[m], column / 8), weights.step(m, key / 16), b[0], b[1]);
          ptx::mma<T>(quad(o[m], column / 8 + 1), weights.step(m, key / 16), b[2], b[3]);
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
    __device__ __forceinline__ explicit Split(float x) {
      high = ptx::to_tf32(x);
      // Of an infinity, NaN.
      low = ptx::to_tf32(x - __uint_as_float(high));
    }
    Split() = default;
  };

  // One 16 x 8 first operand.
  struct Factor {
    uint32_t high[4], low[4];
    __device__ __forceinline__ void set(int i, float x) {
      const Split split(x);
      high[i] = split.high;
      low[i] = split.low;
    }
  };

  static __device__ __forceinline__ void multiply(float (&d)[4], const Factor& a, Split b0,
                                                  Split b1) {
    ptx::mma_tf32(d, a.low, b0.high, b1.high);
    ptx::mma_tf32(d, a.high, b0.low, b1.low);
    ptx::mma_tf32(d, a.high, b0.high, b1.high);
  }

  static __device__ __forceinline__ Factor factor(const SharedRows<float>& rows, int row,
                                                  int column) {
    const int lane = threadIdx.x % 32;
    const auto pair = [&](int r) {
      return *reinterpret_cast<const float2*>(rows.at(row + lane / 4 + r, column + lane % 4 * 2));
    };
    const float2 upper = pair(0), lower = pair(8);
    Factor a;
    a.set(0, upper.x);
    a.set(1, lower.x);
    a.set(2, upper.y);
    a.set(3, lower.y);
    return a;
  }

  template <int kDim, int kRowTiles, int kTiles>
  static __device__ __forceinline__ void scores(float (&s)[kRowTiles][4 * kTiles],
                                                const SharedRows<float>& q,
                                                const SharedRows<float>& k) {
    static_assert(kRowTiles == 1);
    constexpr int kSumColumns = 64;
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = 0; first < kDim; first += kSumColumns) {
      float part[4 * kTiles] = {};
#pragma unroll 1
      for (int column = first; column < first + kSumColumns; column += 8) {
        const Factor a = factor(q, 0, column);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const float2 b =
              *reinterpret_cast<const float2*>(k.at(8 * tile + lane / 4, column + lane % 4 * 2));
          multiply(quad(part, tile), a, Split(b.x), Split(b.y));
        }
      }
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) s[0][i] += part[i];
    }
  }

  template <int kRowTiles, int kKeys>
  struct Weights {
    static_assert(kRowTiles == 1);
    Factor p[kKeys / 8];

    __device__ __forceinline__ explicit Weights(const float (&s)[1][kKeys / 2]) {
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        p[i].set(0, s[0][4 * i]);
        p[i].set(1, s[0][4 * i + 2]);
        p[i].set(2, s[0][4 * i + 1]);
        p[i].set(3, s[0][4 * i + 3]);
      }
    }
    __device__ __forceinline__ explicit Weights(const SharedRows<float>& rows) {
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) p[i] = factor(rows, 0, 8 * i);
    }
  };

  template <int kRowTiles, int kKeys, int kColumns>
  static __device__ __forceinline__ void values(float (&o)[kRowTiles][kColumns / 2],
                                                const float (&correction)[kRowTiles][2],
                                                Weights<kRowTiles, kKeys>& weights,
                                                const SharedRows<float>& v) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int tile = 0; tile < kColumns / 8; ++tile) {
      float part[4] = {};
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        const float* at = v.at(8 * i + lane % 4 * 2, 8 * tile + lane / 4);
        multiply(part, weights.p[i], Split(at[0]), Split(at[v.pitch]));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        o[0][4 * tile + i] = fmaf(o[0][4 * tile + i], correction[0][i / 2], part[i]);
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
