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

#include <limits>
#include <type_traits>

#include "core/array_mask.h"
#include "core/element.h"
#include "core/score_rules.h"
#include "cpu/common/vector_math-inl.h"

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

// Calls body(constant) with the number of vectors that a panel takes.
template <typename Body>
HWY_INLINE void with_vectors(int64_t vectors, const Body& body) {
  static_assert(kPanelVectors == 3);
  switch (vectors) {
    case 1:
      return body(std::integral_constant<int, 1>());
    case 2:
      return body(std::integral_constant<int, 2>());
    default:
      return body(std::integral_constant<int, 3>());
  }
}

#if HWY_TARGET != HWY_SCALAR
using F32x4 = hn::FixedTag<float, 4>;
using Vec4 = hn::Vec<F32x4>;
struct Four {
  Vec4 a, b, c, d;
};

HWY_INLINE Four transpose_four(const float* from, ptrdiff_t stride) {
  const F32x4 d;
  const auto row_0 = hn::LoadU(d, from), row_1 = hn::LoadU(d, from + stride);
  const auto row_2 = hn::LoadU(d, from + 2 * stride), row_3 = hn::LoadU(d, from + 3 * stride);
  const auto low_01 = hn::InterleaveLower(d, row_0, row_1);
  const auto low_23 = hn::InterleaveLower(d, row_2, row_3);
  const auto high_01 = hn::InterleaveUpper(d, row_0, row_1);
  const auto high_23 = hn::InterleaveUpper(d, row_2, row_3);
  return {hn::ConcatLowerLower(d, low_23, low_01), hn::ConcatUpperUpper(d, low_23, low_01),
          hn::ConcatLowerLower(d, high_23, high_01), hn::ConcatUpperUpper(d, high_23, high_01)};
}
#endif

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

// 4 rows of `from` become 4 neighbouring lanes: to[c][0..4) = from[0..4)[c]. Moves bits, so pairs
// of bf16 pass as well.
HWY_INLINE void transpose_into_lanes(const float* HWY_RESTRICT from, ptrdiff_t from_stride,
                                     int64_t columns, float* HWY_RESTRICT to, ptrdiff_t to_stride) {
  int64_t c = 0;
#if HWY_TARGET != HWY_SCALAR
  for (; c + 4 <= columns; c += 4) {
    const Four t = transpose_four(from + c, from_stride);
    hn::StoreU(t.a, F32x4(), to + c * to_stride);
    hn::StoreU(t.b, F32x4(), to + (c + 1) * to_stride);
    hn::StoreU(t.c, F32x4(), to + (c + 2) * to_stride);
    hn::StoreU(t.d, F32x4(), to + (c + 3) * to_stride);
  }
#endif
  for (; c < columns; ++c) {
    for (int i = 0; i < 4; ++i) to[c * to_stride + i] = from[i * from_stride + c];
  }
}

// The same for 4 equal rows.
HWY_INLINE void broadcast_into_lanes(const float* HWY_RESTRICT from, int64_t columns,
                                     float* HWY_RESTRICT to, ptrdiff_t to_stride) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int i = 0; i < 4; ++i) to[c * to_stride + i] = from[c];
  }
}

// The way back: to[0..4)[c] = from[c][0..4).
HWY_INLINE void transpose_from_lanes(const float* HWY_RESTRICT from, ptrdiff_t from_stride,
                                     int64_t columns, float* HWY_RESTRICT to, ptrdiff_t to_stride) {
  int64_t c = 0;
#if HWY_TARGET != HWY_SCALAR
  for (; c + 4 <= columns; c += 4) {
    const Four t = transpose_four(from + c * from_stride, from_stride);
    hn::StoreU(t.a, F32x4(), to + c);
    hn::StoreU(t.b, F32x4(), to + to_stride + c);
    hn::StoreU(t.c, F32x4(), to + 2 * to_stride + c);
    hn::StoreU(t.d, F32x4(), to + 3 * to_stride + c);
  }
#endif
  for (; c < columns; ++c) {
    for (int i = 0; i < 4; ++i) to[i * to_stride + c] = from[c * from_stride + i];
  }
}

// Biases in base 2 of keys [begin, begin + keys) for one query row.
inline void load_mask_row(const Problem& p, const void* mask, int64_t batch_idx, int64_t head,
                          int64_t query_idx, int64_t begin, int64_t keys, float* HWY_RESTRICT to) {
  const F32 f32;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(f32));
  int64_t j = 0;
  if (p.stride_mask[3] == 1 && p.mask == MaskKind::kBoolean) {
    const auto* from = static_cast<const uint8_t*>(mask) + batch_idx * p.stride_mask[0] +
                       head * p.stride_mask[1] + query_idx * p.stride_mask[2] + begin;
    const hn::Rebind<uint8_t, F32> u8;
    const I32 i32;
    const auto masked = hn::Set(f32, -std::numeric_limits<float>::infinity());
    for (; j + lanes <= keys; j += lanes) {
      const auto is_hidden = hn::Eq(hn::PromoteTo(i32, hn::LoadU(u8, from + j)), hn::Zero(i32));
      hn::StoreU(hn::IfThenElseZero(hn::RebindMask(f32, is_hidden), masked), f32, to + j);
    }
  } else if (p.stride_mask[3] == 1) {
    const int64_t offset = batch_idx * p.stride_mask[0] + head * p.stride_mask[1] +
                           query_idx * p.stride_mask[2] + begin;
    const auto log2e = hn::Set(f32, kLog2E);
    const Dtype dtype = p.mask == MaskKind::kAdditiveF32 ? Dtype::kF32 : p.dtype_q;
    for (; j + lanes <= keys; j += lanes) {
      const auto bias = limited_biases(load_f32(mask, dtype, offset + j));
      hn::StoreU(hn::Mul(bias, log2e), f32, to + j);
    }
  }
  for (; j < keys; ++j) {
    to[j] = mask_bias(p, mask, batch_idx, head, query_idx, begin + j) * kLog2E;
  }
}

// Widens one row to f32. Answers whether every element is finite.
template <typename T>
HWY_INLINE bool widen_row(const T* HWY_RESTRICT from, int64_t stride, int64_t dim,
                          float* HWY_RESTRICT to) {
  const F32 f32;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(f32));
  const auto zero = hn::Zero(f32);
  auto finite = zero;  // stays 0 while everything is finite: x * 0 is NaN for infinity and NaN
  float finite_tail = 0;
  int64_t d = 0;
  if (stride == 1) {
    for (; d + lanes <= dim; d += lanes) {
      const auto x = load_f32(from + d);
      finite = hn::MulAdd(x, zero, finite);
      hn::StoreU(x, f32, to + d);
    }
  }
  for (; d < dim; ++d) {
    to[d] = to_float(from[d * stride]);
    finite_tail += to[d] * 0.0f;
  }
  return hn::AllTrue(f32, hn::Eq(finite, zero)) && finite_tail == 0.0f;
}

inline bool widen_row(const void* from, Dtype dtype, int64_t offset, int64_t stride, int64_t dim,
                      float* to) {
  return with_element_type(dtype, [&]<typename T>(T) {
    return widen_row(static_cast<const T*>(from) + offset, stride, dim, to);
  });
}

// Widens rows of K or V from element `first` on into rows of `columns`, zero-filled. Answers
// whether every element is finite: only then may a masked key be left to a weight of zero.
template <typename T>
bool widen_rows(const T* HWY_RESTRICT from, const Strides& stride, int64_t rows, int64_t dim,
                int64_t columns, float* HWY_RESTRICT to) {
  bool is_finite = true;
  for (int64_t i = 0; i < rows; ++i, from += stride[2], to += columns) {
    is_finite &= widen_row(from, stride[3], dim, to);
    for (int64_t d = dim; d < columns; ++d) to[d] = 0.0f;
  }
  return is_finite;
}

inline bool widen_rows(const void* from, Dtype dtype, int64_t first, const Strides& stride,
                       int64_t rows, int64_t dim, int64_t columns, float* to) {
  return with_element_type(dtype, [&]<typename T>(T) {
    return widen_rows(static_cast<const T*>(from) + first, stride, rows, dim, columns, to);
  });
}

template <typename T>
void store_scaled_as(const float* o, float factor, int64_t dim, T* out, int64_t stride) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(F32()));
  int64_t d = 0;
  if (stride == 1) {
    for (; d + lanes <= dim; d += lanes) {
      store_as(hn::Mul(load_f32(o + d), hn::Set(F32(), factor)), out + d);
    }
  }
  for (; d < dim; ++d) out[d * stride] = from_float<T>(o[d] * factor);
}

// One row: out[offset + d * stride] = o[d] * factor.
inline void store_scaled(const float* o, float factor, int64_t dim, void* out, Dtype dtype,
                         int64_t offset, int64_t stride) {
  with_element_type(dtype, [&]<typename T>(T) {
    store_scaled_as(o, factor, dim, static_cast<T*>(out) + offset, stride);
  });
}

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
