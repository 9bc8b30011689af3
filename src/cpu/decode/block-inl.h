// The products of decode: a block of 1 to 8 query rows against a tile of keys that lie as the
// caller left them, or widened: `Keys` and `Values` are rows of cpu/common/kv_rows-inl.h.
// Re-included per target.
#if defined(WH_CPU_DECODE_BLOCK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WH_CPU_DECODE_BLOCK_INL_H_
#undef WH_CPU_DECODE_BLOCK_INL_H_
#else
#define WH_CPU_DECODE_BLOCK_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <type_traits>

#include "cpu/common/kv_rows-inl.h"
#include "cpu/common/tile-inl.h"
#include "cpu/common/vector_math-inl.h"
#include "cpu/decode/config.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Rows of a block: never more than the lanes of a vector.
#if HWY_TARGET == HWY_SCALAR
constexpr int kRowBlock = 1;
#elif HWY_TARGET <= HWY_AVX3
constexpr int kRowBlock = 8;
#else
constexpr int kRowBlock = 4;
#endif

// Sums that a block keeps in registers; the rest of them holds what is loaded. With 12 of 16, four
// rows multiply each query by three keys and not two: 8 sums in flight are just what two
// multiply-adds a cycle of four cycles each need, and any load that comes late shows.
template <int kRows>
constexpr int kAccumulators = HWY_TARGET <= HWY_AVX3 ? 16
                              : kRows == 4           ? 12
                                                     : 8;
template <int kRows>
constexpr int kBlockKeys = kAccumulators<kRows> / kRows;

// Rows to bring into L1, a few whenever a loop comes round: all at once would fill the line buffers
// and stall the loads of the tile. On a Zen 5 into L2 instead is 13 to 30 % slower from memory and
// in L3, even where two tiles are more than L1 holds (48 keys of 512 f16: 96 KiB).
struct Prefetch {
  const char* data;
  ptrdiff_t row_stride_bytes;
  int64_t rows;
  int64_t row_bytes;

  static Prefetch of(const KvTensor& tensor, const KvPlace& first, int64_t rows) {
    return {static_cast<const char*>(tensor.data) + tensor.bytes(tensor.offset(first)),
            tensor.bytes(tensor.stride[2]), rows, tensor.bytes(tensor.dim)};
  }
  HWY_INLINE void fetch(int64_t row) const {
    if (row >= rows) return;
    const char* from = data + row * row_stride_bytes;
    for (int64_t b = 0; b < row_bytes; b += 64) __builtin_prefetch(from + b, 0, 3);
  }
};

// Fetches `rows` of them evenly over a loop: `rows` of every `steps` that it counts.
class EvenPrefetch {
 public:
  HWY_INLINE EvenPrefetch(Prefetch ahead, int64_t first, int64_t rows, int64_t steps)
      : ahead_(ahead), row_(first), rows_(rows), steps_(steps) {}
  HWY_INLINE void advance(int64_t steps) {
    for (due_ += rows_ * steps; due_ >= steps_; due_ -= steps_) ahead_.fetch(row_++);
  }

 private:
  const Prefetch ahead_;
  int64_t row_;
  const int64_t rows_, steps_;
  int64_t due_ = 0;
};

// op over the lanes that hold the same row, that is lanes equal modulo kRows, in all of them.
template <int kRows, typename Op>
HWY_INLINE Vec fold(Vec x, const Op& op) {
  const F32 f32;
  const I32 i32;
  for (int32_t step = kRows; step < static_cast<int32_t>(hn::Lanes(f32)); step *= 2) {
    const auto partner = hn::Xor(hn::Iota(i32, 0), hn::Set(i32, step));
    x = op(x, hn::TableLookupLanes(x, hn::IndicesFromVec(f32, partner)));
  }
  return x;
}
template <int kRows>
HWY_INLINE Vec fold_max(Vec x) {
  return fold<kRows>(x, [](Vec a, Vec b) HWY_ATTR { return hn::Max(a, b); });
}
template <int kRows>
HWY_INLINE Vec fold_sum(Vec x) {
  return fold<kRows>(x, [](Vec a, Vec b) HWY_ATTR { return hn::Add(a, b); });
}

// to[i] = the sum of lanes of acc[i].
template <int kCount>
HWY_INLINE void store_sums(const Vec (&acc)[kCount], float* to) {
  [[maybe_unused]] const F32 f32;
#if HWY_TARGET <= HWY_AVX3
  static_assert(kCount == 16);
  // A transposing tree: each level halves the vectors and adds what the shuffles brought together.
  __m512 pair[8], four[4], block[2];
  WH_UNROLL for (int i = 0; i < 8; ++i) {
    const __m512 a = acc[2 * i].raw, b = acc[2 * i + 1].raw;
    pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  WH_UNROLL for (int i = 0; i < 4; ++i) {
    const __m512 a = pair[2 * i], b = pair[2 * i + 1];
    four[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  WH_UNROLL for (int i = 0; i < 2; ++i) {
    const __m512 a = four[2 * i], b = four[2 * i + 1];
    block[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  const __m512 sums = _mm512_add_ps(_mm512_shuffle_f32x4(block[0], block[1], 0x88),
                                    _mm512_shuffle_f32x4(block[0], block[1], 0xdd));
  hn::StoreU(Vec{sums}, f32, to);
#elif HWY_TARGET == HWY_SCALAR
  for (int i = 0; i < kCount; ++i) to[i] = hn::GetLane(acc[i]);
#else
  WH_UNROLL for (int i = 0; i < kCount; i += 4) {
    const auto ac = hn::Add(hn::InterleaveLower(f32, acc[i], acc[i + 2]),
                            hn::InterleaveUpper(f32, acc[i], acc[i + 2]));
    const auto bd = hn::Add(hn::InterleaveLower(f32, acc[i + 1], acc[i + 3]),
                            hn::InterleaveUpper(f32, acc[i + 1], acc[i + 3]));
    // Each 128-bit block now holds its part of the four sums.
    const auto blocks = hn::Add(hn::InterleaveLower(f32, ac, bd), hn::InterleaveUpper(f32, ac, bd));
#if HWY_TARGET == HWY_AVX2
    const hn::Half<F32> half;
    hn::StoreU(hn::Add(hn::LowerHalf(half, blocks), hn::UpperHalf(half, blocks)), half, to + i);
#else
    hn::StoreU(blocks, f32, to + i);
#endif
  }
#endif
}

// g++ would fold a load into each multiply-add that uses it: 16 loads where 8 do, and two a cycle
// are all there are.
HWY_INLINE void keep_in_register([[maybe_unused]] Vec& v) {
#if HWY_ARCH_X86 && HWY_TARGET != HWY_SCALAR && !HWY_COMPILER_CLANG
  asm("" : "+v"(v.raw));
#endif
}

// s[i][r] = q[r] . k[i] for kBlockKeys<kRows> keys. `ahead` advances by a step a column.
template <int kRows, typename Keys>
HWY_INLINE void score_block(Matrix<float> q, int64_t columns, Keys k, EvenPrefetch ahead,
                            float* HWY_RESTRICT s) {
  constexpr int kKeys = kBlockKeys<kRows>;
  const F32 f32;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(f32));
  Vec acc[kAccumulators<kRows>];
  WH_UNROLL for (int i = 0; i < kAccumulators<kRows>; ++i) acc[i] = hn::Zero(f32);
  int64_t d = 0;
  if constexpr (Keys::kHasPairs) {
    // Key by key: pairs of all of them would fill the registers. Each sum adds up in the same
    // order.
    for (; d + 2 * lanes <= columns; d += 2 * lanes) {
      ahead.advance(2 * lanes);
      WH_UNROLL for (int i = 0; i < kKeys; ++i) {
        const VecPair key = k.load_pair(i, d);
        WH_UNROLL for (int r = 0; r < kRows; ++r) {
          const float* query = q.data + r * q.row_stride + d;
          Vec& sum = acc[i * kRows + r];
          sum = hn::MulAdd(hn::Load(f32, query), key.low, sum);
          sum = hn::MulAdd(hn::Load(f32, query + lanes), key.high, sum);
        }
      }
    }
  }
  for (; d < columns; d += lanes) {
    ahead.advance(lanes);
    Vec key[kKeys];
    WH_UNROLL for (int i = 0; i < kKeys; ++i) key[i] = k.load(i, d);
    WH_UNROLL for (int r = 0; r < kRows; ++r) {
      auto query = hn::Load(f32, q.data + r * q.row_stride + d);
      keep_in_register(query);
      WH_UNROLL for (int i = 0; i < kKeys; ++i) {
        acc[i * kRows + r] = hn::MulAdd(query, key[i], acc[i * kRows + r]);
      }
    }
  }
  store_sums(acc, s);
}

// One row, one key: what is left of a tile after whole blocks.
template <typename Keys>
HWY_INLINE float score_one(const float* HWY_RESTRICT q, int64_t columns, Keys k, int64_t key) {
  const F32 f32;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(f32));
  auto sum = hn::Zero(f32);
  for (int64_t d = 0; d < columns; d += lanes) {
    sum = hn::MulAdd(hn::Load(f32, q + d), k.load(key, d), sum);
  }
  return hn::GetLane(hn::SumOfLanes(f32, sum));
}

// s[j][r] for all keys of a tile, fetching a row of `ahead` for each key.
template <int kRows, typename Keys>
void score_rows(Matrix<float> q, int64_t columns, Keys k, int64_t keys, const Prefetch& ahead,
                float* s) {
  constexpr int kKeys = kBlockKeys<kRows>;
  int64_t j = 0;
  for (; j + kKeys <= keys; j += kKeys) {
    score_block<kRows>(q, columns, k.from(j, 0), EvenPrefetch(ahead, j, kKeys, columns),
                       s + j * kRows);
  }
  for (; j < keys; ++j) {
    ahead.fetch(j);
    for (int r = 0; r < kRows; ++r) {
      s[j * kRows + r] = score_one(q.data + r * q.row_stride, columns, k, j);
    }
  }
}

// kVectors vectors of columns: o[r] = alpha[r] * o[r] + sum_j p[j][r] * v[j].
template <int kRows, int kVectors, typename Values>
HWY_INLINE void value_block(const float* HWY_RESTRICT p, Values v, int64_t keys,
                            const float* HWY_RESTRICT alpha, const Prefetch& ahead,
                            float* HWY_RESTRICT o, int64_t o_stride) {
  const F32 f32;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(f32));
  Vec acc[kRows][kVectors];
  WH_UNROLL for (int r = 0; r < kRows; ++r) {
    const auto rescale = hn::Set(f32, alpha[r]);
    WH_UNROLL for (int c = 0; c < kVectors; ++c) {
      acc[r][c] = hn::Mul(rescale, hn::Load(f32, o + r * o_stride + c * lanes));
    }
  }
  for (int64_t j = 0; j < keys; ++j) {
    Vec value[kVectors];
    constexpr int kPaired = Values::kHasPairs ? kVectors / 2 * 2 : 0;
    if constexpr (kPaired > 0) {
      WH_UNROLL for (int c = 0; c < kPaired; c += 2) {
        const VecPair pair = v.load_pair(0, c * lanes);
        value[c] = pair.low;
        value[c + 1] = pair.high;
      }
    }
    WH_UNROLL for (int c = kPaired; c < kVectors; ++c) value[c] = v.load(0, c * lanes);
    WH_UNROLL for (int r = 0; r < kRows; ++r) {
      const auto weight = hn::Set(f32, p[j * kRows + r]);
      WH_UNROLL for (int c = 0; c < kVectors; ++c) {
        acc[r][c] = hn::MulAdd(weight, value[c], acc[r][c]);
      }
    }
    v = v.from(1, 0);
    ahead.fetch(j);
  }
  WH_UNROLL for (int r = 0; r < kRows; ++r) {
    WH_UNROLL for (int c = 0; c < kVectors; ++c) {
      hn::Store(acc[r][c], f32, o + r * o_stride + c * lanes);
    }
  }
}

// All columns, fetching `ahead` evenly over them.
template <int kRows, typename Values>
void value_rows(const float* p, Values v, int64_t keys, int64_t columns, const float* alpha,
                const Prefetch& ahead, float* o, int64_t o_stride) {
  constexpr int kVectors = std::min(kAccumulators<kRows> / kRows, 8);
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(F32()));
  const int64_t vectors = columns / lanes;
  int64_t first = 0, fetched = 0;
  const auto block = [&](auto count) HWY_ATTR {
    const int64_t d = first * lanes;
    first += count();
    const int64_t end = ahead.rows * first / vectors;
    const Prefetch part{ahead.data + fetched * ahead.row_stride_bytes, ahead.row_stride_bytes,
                        end - fetched, ahead.row_bytes};
    fetched = end;
    value_block<kRows, count()>(p, v.from(0, d), keys, alpha, part, o + d, o_stride);
  };
  while (first < vectors) {
    const int64_t left = vectors - first;
    // Four are two pairs and not three and one, whose few sums would wait for each other.
    if (left >= kVectors && (kVectors != 3 || left != 4)) {
      block(std::integral_constant<int, kVectors>());
    } else if (kVectors > 2 && left >= 2) {
      block(std::integral_constant<int, 2>());
    } else {
      block(std::integral_constant<int, 1>());
    }
  }
}

// Whether a weight of zero hides every row of v.
template <typename Values>
bool all_finite(Values v, int64_t rows, int64_t dim) {
  const F32 f32;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(f32));
  auto finite = hn::Zero(f32);  // stays 0 while everything is finite
  for (int64_t j = 0; j < rows; ++j) {
    for (int64_t d = 0; d < dim; d += lanes) {
      finite = hn::MulAdd(v.load(j, d), hn::Zero(f32), finite);
    }
  }
  return hn::AllTrue(f32, hn::Eq(finite, hn::Zero(f32)));
}

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
