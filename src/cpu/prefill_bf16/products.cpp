#include "cpu/prefill_bf16/products.h"

#include <immintrin.h>

#define WH_UNROLL _Pragma("GCC unroll 24")

namespace wh::cpu {
namespace {

constexpr int kTileRows = 8;

// 4 bytes at any address, in all lanes.
inline __m512bh broadcast(const void* pair) {
  int bits;
  __builtin_memcpy(&bits, pair, sizeof(bits));
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits));
}
inline __m512bh load(const float* pairs) {
  return reinterpret_cast<__m512bh>(_mm512_load_si512(pairs));
}

template <int kRows, int kVectors>
inline void score_tile(const Bf16Scores& x, const uint16_t* k, float* s) {
  __m512 acc[kRows][kVectors];
  WH_UNROLL for (int r = 0; r < kRows; ++r) {
    WH_UNROLL for (int c = 0; c < kVectors; ++c) acc[r][c] = _mm512_setzero_ps();
  }
  const float* q = x.q;
  const ptrdiff_t k_stride = x.k_stride;
  for (int64_t pair = 0; pair < x.pairs; ++pair) {
    __m512bh query[kVectors];
    WH_UNROLL for (int c = 0; c < kVectors; ++c) query[c] = load(q + c * kBf16Lanes);
    WH_UNROLL for (int r = 0; r < kRows; ++r) {
      const __m512bh key = broadcast(k + r * k_stride);
      WH_UNROLL for (int c = 0; c < kVectors; ++c) {
        acc[r][c] = _mm512_dpbf16_ps(acc[r][c], query[c], key);
      }
    }
    q += kVectors * kBf16Lanes;
    k += 2;
  }
  const __m512 scale = _mm512_set1_ps(x.scale);
  WH_UNROLL for (int r = 0; r < kRows; ++r) {
    WH_UNROLL for (int c = 0; c < kVectors; ++c) {
      _mm512_store_ps(s + (r * kVectors + c) * kBf16Lanes, _mm512_mul_ps(acc[r][c], scale));
    }
  }
}

// K is read in place, so the last keys go by fours and ones: a whole tile would read past them.
template <int kVectors>
void scores(const Bf16Scores& x) {
  constexpr int kWidth = kVectors * kBf16Lanes;
  int64_t j = 0;
  for (; j + kTileRows <= x.keys; j += kTileRows) {
    score_tile<kTileRows, kVectors>(x, x.k + j * x.k_stride, x.s + j * kWidth);
  }
  for (; j + 4 <= x.keys; j += 4) {
    score_tile<4, kVectors>(x, x.k + j * x.k_stride, x.s + j * kWidth);
  }
  for (; j < x.keys; ++j) score_tile<1, kVectors>(x, x.k + j * x.k_stride, x.s + j * kWidth);
}

enum class Weights { kRounded, kTwoParts };

template <int kVectors, Weights kWeights>
inline void value_tile(const Bf16Values& x, const float* v, float* o) {
  constexpr int kParts = kWeights == Weights::kTwoParts ? 2 : 1;
  constexpr int kWidth = kVectors * kBf16Lanes;
  __m512 acc[kTileRows][kVectors];
  WH_UNROLL for (int c = 0; c < kVectors; ++c) {
    const __m512 rescale = _mm512_load_ps(x.alpha + c * kBf16Lanes);
    WH_UNROLL for (int r = 0; r < kTileRows; ++r) {
      acc[r][c] = _mm512_mul_ps(_mm512_load_ps(o + r * kWidth + c * kBf16Lanes), rescale);
    }
  }
  const float* p[2] = {x.p, x.p_low};
  for (int64_t j = 0; j < x.key_pairs; ++j) {
    __m512bh weight[kParts][kVectors];
    WH_UNROLL for (int i = 0; i < kParts; ++i) {
      WH_UNROLL for (int c = 0; c < kVectors; ++c) weight[i][c] = load(p[i] + c * kBf16Lanes);
      p[i] += kWidth;
    }
    WH_UNROLL for (int r = 0; r < kTileRows; ++r) {
      const __m512bh value = broadcast(v + r);
      WH_UNROLL for (int i = 0; i < kParts; ++i) {
        WH_UNROLL for (int c = 0; c < kVectors; ++c) {
          acc[r][c] = _mm512_dpbf16_ps(acc[r][c], weight[i][c], value);
        }
      }
    }
    v += x.v_stride;
  }
  WH_UNROLL for (int r = 0; r < kTileRows; ++r) {
    WH_UNROLL for (int c = 0; c < kVectors; ++c) {
      _mm512_store_ps(o + r * kWidth + c * kBf16Lanes, acc[r][c]);
    }
  }
}

template <int kVectors>
void values(const Bf16Values& x) {
  for (int64_t d = 0; d < x.columns; d += kTileRows) {
    float* o = x.o + d * kVectors * kBf16Lanes;
    if (x.p_low == nullptr) {
      value_tile<kVectors, Weights::kRounded>(x, x.v + d, o);
    } else {
      value_tile<kVectors, Weights::kTwoParts>(x, x.v + d, o);
    }
  }
}

}  // namespace

void bf16_scores(const Bf16Scores& operands, int vectors) {
  if (vectors == 1) return scores<1>(operands);
  if (vectors == 2) return scores<2>(operands);
  scores<3>(operands);
}

void bf16_values(const Bf16Values& operands, int vectors) {
  if (vectors == 1) return values<1>(operands);
  if (vectors == 2) return values<2>(operands);
  values<3>(operands);
}

}  // namespace wh::cpu
