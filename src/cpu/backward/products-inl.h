// The product that only gradients have, dq from keys as they lie in memory. The other four, with
// keys on SIMD lanes, are the forward pass's: cpu/common/tile-inl.h.
#if defined(WH_CPU_BACKWARD_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WH_CPU_BACKWARD_PRODUCTS_INL_H_
#undef WH_CPU_BACKWARD_PRODUCTS_INL_H_
#else
#define WH_CPU_BACKWARD_PRODUCTS_INL_H_
#endif

#include <hwy/highway.h>

#include "cpu/common/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

struct Matrix {
  float* data;
  ptrdiff_t stride;
};

// dq[row][d] += sum_key ds[row][key] * k[key][d], of kTileRows rows and kVectors vectors of d.
template <int kVectors>
HWY_INLINE void query_tile(const Matrix ds, const Matrix k, const int64_t keys, const Matrix dq) {
  const F32 f32;
  const ptrdiff_t lanes = hn::Lanes(f32);
  Vec acc[kTileRows][kVectors];
  WH_UNROLL for (int r = 0; r < kTileRows; ++r) {
    WH_UNROLL for (int c = 0; c < kVectors; ++c) {
      acc[r][c] = hn::Load(f32, dq.data + r * dq.stride + c * lanes);
    }
  }
  const float* HWY_RESTRICT weight = ds.data;
  const float* HWY_RESTRICT key = k.data;
  for (int64_t j = 0; j < keys; ++j) {
    Vec columns[kVectors];
    WH_UNROLL for (int c = 0; c < kVectors; ++c) columns[c] = hn::Load(f32, key + c * lanes);
    WH_UNROLL for (int r = 0; r < kTileRows; ++r) {
      const auto w = hn::Set(f32, weight[r * ds.stride]);
      WH_UNROLL for (int c = 0; c < kVectors; ++c) acc[r][c] = hn::MulAdd(w, columns[c], acc[r][c]);
    }
    ++weight;
    key += k.stride;
  }
  WH_UNROLL for (int r = 0; r < kTileRows; ++r) {
    WH_UNROLL for (int c = 0; c < kVectors; ++c) {
      hn::Store(acc[r][c], f32, dq.data + r * dq.stride + c * lanes);
    }
  }
}

// The same of all rows and columns: multiples of kTileRows and of a vector.
inline void add_to_queries(const Matrix ds, const Matrix k, const int64_t keys, const Matrix dq,
                           int64_t rows, int64_t columns) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(F32()));
  for (int64_t d = 0; d < columns; d += kPanelVectors * lanes) {
    with_vectors((columns - d) / lanes, [&](auto vectors) HWY_ATTR {
      for (int64_t r = 0; r < rows; r += kTileRows) {
        query_tile<vectors()>({ds.data + r * ds.stride, ds.stride}, {k.data + d, k.stride}, keys,
                              {dq.data + r * dq.stride + d, dq.stride});
      }
    });
  }
}

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
