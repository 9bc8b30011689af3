// The two products of attention with queries on SIMD lanes:
//
//   scores:  S^T[key][lane]  = sum_d K[key][d] * Q^T[d][lane]
//   values:  O^T[dv][lane]   = alpha[lane] * O^T[dv][lane] + sum_key V[key][dv] * P^T[key][lane]
//
// A register tile holds kTileRows broadcast rows times up to kPanelVectors vectors of queries:
// 4 x 24 on AVX2 (12 accumulators of 16 registers), 8 x 48 on AVX-512 (24 of 32). K and V keep
// their natural [key][dim] order, so nothing is transposed but Q, once. Softmax becomes vertical.
#if defined(WH_CPU_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WH_CPU_TILE_INL_H_
#undef WH_CPU_TILE_INL_H_
#else
#define WH_CPU_TILE_INL_H_
#endif

#include <hwy/highway.h>

#include "cpu/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr int kPanelVectors = 3;
#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64  // 32 vector registers
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif

#define WH_UNROLL _Pragma("GCC unroll 24")

// kVectors * Lanes(F32) query lanes, kTileRows keys. Rows of k are k_stride apart.
template <int kVectors>
HWY_INLINE void score_tile(const float* HWY_RESTRICT q_panel, const float* HWY_RESTRICT k,
                           const ptrdiff_t k_stride, const int64_t dim, float* HWY_RESTRICT s) {
  const F32 f32;
  const ptrdiff_t lanes = hn::Lanes(f32);
  Vec acc[kTileRows][kVectors];
  WH_UNROLL for (int r = 0; r < kTileRows; ++r) {
    WH_UNROLL for (int c = 0; c < kVectors; ++c) acc[r][c] = hn::Zero(f32);
  }
  for (int64_t d = 0; d < dim; ++d) {
    Vec q[kVectors];
    WH_UNROLL for (int c = 0; c < kVectors; ++c) q[c] = hn::Load(f32, q_panel + c * lanes);
    WH_UNROLL for (int r = 0; r < kTileRows; ++r) {
      const auto key = hn::Set(f32, k[r * k_stride]);
      WH_UNROLL for (int c = 0; c < kVectors; ++c) acc[r][c] = hn::MulAdd(key, q[c], acc[r][c]);
    }
    q_panel += kVectors * lanes;
    ++k;
  }
  WH_UNROLL for (int r = 0; r < kTileRows; ++r) {
    WH_UNROLL for (int c = 0; c < kVectors; ++c) {
      hn::Store(acc[r][c], f32, s + (r * kVectors + c) * lanes);
    }
  }
}

// kTileRows value columns. v points at [0][first column]; alpha rescales what o holds.
template <int kVectors>
HWY_INLINE void value_tile(const float* HWY_RESTRICT p_panel, const float* HWY_RESTRICT v,
                           const ptrdiff_t v_stride, const int64_t keys,
                           const float* HWY_RESTRICT alpha, float* HWY_RESTRICT o) {
  const F32 f32;
  const ptrdiff_t lanes = hn::Lanes(f32);
  Vec acc[kTileRows][kVectors];
  WH_UNROLL for (int c = 0; c < kVectors; ++c) {
    const auto rescale = hn::Load(f32, alpha + c * lanes);
    WH_UNROLL for (int r = 0; r < kTileRows; ++r) {
      acc[r][c] = hn::Mul(hn::Load(f32, o + (r * kVectors + c) * lanes), rescale);
    }
  }
  for (int64_t j = 0; j < keys; ++j) {
    Vec p[kVectors];
    WH_UNROLL for (int c = 0; c < kVectors; ++c) p[c] = hn::Load(f32, p_panel + c * lanes);
    WH_UNROLL for (int r = 0; r < kTileRows; ++r) {
      const auto value = hn::Set(f32, v[r]);
      WH_UNROLL for (int c = 0; c < kVectors; ++c) acc[r][c] = hn::MulAdd(value, p[c], acc[r][c]);
    }
    p_panel += kVectors * lanes;
    v += v_stride;
  }
  WH_UNROLL for (int r = 0; r < kTileRows; ++r) {
    WH_UNROLL for (int c = 0; c < kVectors; ++c) {
      hn::Store(acc[r][c], f32, o + (r * kVectors + c) * lanes);
    }
  }
}

// Widens rows of one K or V tile to f32, zero-fills columns up to `columns`, and answers whether
// every element is finite: only then may a masked key be left to a weight of zero.
template <typename T>
bool widen_rows(const T* HWY_RESTRICT from, int64_t row_stride, int64_t column_stride, int64_t rows,
                int64_t dim, int64_t columns, float* HWY_RESTRICT to) {
  const F32 f32;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(f32));
  const auto zero = hn::Zero(f32);
  auto finite = zero;  // stays 0 while everything is finite: x * 0 is NaN for infinity and NaN
  float finite_tail = 0;
  for (int64_t i = 0; i < rows; ++i, from += row_stride, to += columns) {
    int64_t d = 0;
    if (column_stride == 1) {
      for (; d + lanes <= dim; d += lanes) {
        const auto x = load_f32(from + d);
        finite = hn::MulAdd(x, zero, finite);
        hn::StoreU(x, f32, to + d);
      }
    }
    for (; d < dim; ++d) {
      to[d] = to_float(from[d * column_stride]);
      finite_tail += to[d] * 0.0f;
    }
    for (; d < columns; ++d) to[d] = 0.0f;
  }
  return hn::AllTrue(f32, hn::Eq(finite, zero)) && finite_tail == 0.0f;
}

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
