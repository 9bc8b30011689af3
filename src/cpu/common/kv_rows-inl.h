// K and V as they are stored, widened to f32 a vector at a time: rows of one kv head from one key
// on, whose load(row, column) gives the elements from a column on, a multiple of the lanes. What a
// code times its scale rounds to in f32 is what attention is over, in whatever kernel: the answer's
// bits are those over the widened cache. Re-included per target.
#if defined(WH_CPU_KV_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WH_CPU_KV_ROWS_INL_H_
#undef WH_CPU_KV_ROWS_INL_H_
#else
#define WH_CPU_KV_ROWS_INL_H_
#endif

#include <hwy/highway.h>

#include <cmath>
#include <type_traits>

#include "core/element.h"
#include "core/kv_tensor.h"
#include "cpu/common/tile-inl.h"
#include "cpu/common/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

HWY_INLINE Vec load_f32(const Int8* from) {
  const hn::Rebind<int8_t, F32> i8;
  const I32 i32;
  const auto codes = hn::LoadU(i8, reinterpret_cast<const int8_t*>(from));
  return hn::ConvertTo(F32(), hn::PromoteTo(i32, codes));
}

#if (HWY_ARCH_X86 && HWY_TARGET > HWY_AVX2) || HWY_TARGET == HWY_EMU128 || HWY_TARGET == HWY_SCALAR
// A product moves the exponent's bias from 7 to 127, and makes subnormals normal.
HWY_INLINE Vec load_f32(const E4m3* from) {
  const hn::Rebind<uint8_t, F32> u8;
  const hn::RebindToUnsigned<F32> u32;
  const auto code = hn::PromoteTo(u32, hn::LoadU(u8, reinterpret_cast<const uint8_t*>(from)));
  const auto magnitude = hn::And(code, hn::Set(u32, 0x7f));
  const auto scaled =
      hn::Mul(hn::BitCast(F32(), hn::ShiftLeft<20>(magnitude)), hn::Set(F32(), 0x1p120f));
  const auto is_nan = hn::Eq(magnitude, hn::Set(u32, 0x7f));
  const auto nan = hn::IfThenElseZero(is_nan, hn::Set(u32, 0x7fc00000u));
  const auto sign = hn::ShiftLeft<24>(hn::AndNot(hn::Set(u32, 0x7f), code));
  return hn::BitCast(F32(), hn::Or(hn::Or(hn::BitCast(u32, scaled), nan), sign));
}

HWY_INLINE Vec broadcast_f32(Half value) { return hn::Set(F32(), to_float(value)); }
#else
// As f16 of a bias of 15, whose numbers are 256 times smaller: its subnormals widen at no cost and
// under any mode of the CPU, which an f32 product of them would not.
HWY_INLINE Vec load_f32(const E4m3* from) {
  const hn::Rebind<int8_t, F32> i8;
  const hn::Rebind<int16_t, F32> i16;
  const hn::Rebind<hwy::float16_t, F32> f16;
  const auto code = hn::PromoteTo(i16, hn::LoadU(i8, reinterpret_cast<const int8_t*>(from)));
  // The sign is in bits 15 and 14 then, the latter the highest of f16's exponent.
  const auto bits = hn::And(hn::ShiftLeft<7>(code), hn::Set(i16, static_cast<int16_t>(0xbfff)));
  const auto highest = hn::Set(i16, 0x3f80);
  const auto is_nan = hn::Eq(hn::And(bits, highest), highest);
  const auto half = hn::IfThenElse(is_nan, hn::Set(i16, 0x7fff), bits);
  return hn::Mul(hn::PromoteTo(F32(), hn::BitCast(f16, half)), hn::Set(F32(), 256.0f));
}

HWY_INLINE Vec broadcast_f32(Half value) {
  const hn::Rebind<uint16_t, F32> u16;
  const hn::Rebind<hwy::float16_t, F32> f16;
  return hn::PromoteTo(F32(), hn::BitCast(f16, hn::Set(u16, value.bits)));
}
#endif

// Two vectors side by side.
struct VecPair {
  Vec low, high;
};

// Where a vector is half a block, or codes widen by twice as many, rows say kHasPairs, and
// load_pair() does for two vectors what would else be done twice. Of BlockRows it is a whole block.
#if HWY_TARGET <= HWY_AVX3
constexpr bool kPairsAreWorthIt = true;

HWY_INLINE VecPair load_pair(const E4m3* from) {
  const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m512i bits = _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(code), 7),
                                        _mm512_set1_epi16(static_cast<int16_t>(0xbfff)));
  const __m512i highest = _mm512_set1_epi16(0x3f80);
  const __mmask32 is_nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(bits, highest), highest);
  const __m512i half = _mm512_mask_blend_epi16(is_nan, bits, _mm512_set1_epi16(0x7fff));
  const __m512 factor = _mm512_set1_ps(256);
  return {Vec{_mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), factor)},
          Vec{_mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), factor)}};
}
HWY_INLINE VecPair load_pair(const Q8_0& block) {
  const Vec scale = broadcast_f32(block.scale);
  const auto* codes = reinterpret_cast<const Int8*>(block.codes);
  return {hn::Mul(load_f32(codes), scale), hn::Mul(load_f32(codes + 16), scale)};
}
// A code is an index: VPERMPS looks at the lowest four bits alone.
HWY_INLINE VecPair load_pair(const Q4_0& block) {
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i bytes =
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block.codes)));
  const Vec scale = broadcast_f32(block.scale);
  return {hn::Mul(Vec{_mm512_permutexvar_ps(bytes, values)}, scale),
          hn::Mul(Vec{_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values)}, scale)};
}
#else
constexpr bool kPairsAreWorthIt = false;

// Never called, so that who calls it need not be compiled twice.
template <typename From>
HWY_INLINE VecPair load_pair(const From&) {
  return {hn::Zero(F32()), hn::Zero(F32())};
}
#endif

// Elements of a type.
template <typename T>
struct Matrix {
  static constexpr bool kHasPairs = kPairsAreWorthIt && std::is_same_v<T, E4m3>;

  const T* data;
  ptrdiff_t row_stride;

  HWY_INLINE VecPair load_pair(int64_t row, int64_t column) const {
    return HWY_NAMESPACE::load_pair(data + row * row_stride + column);
  }
  HWY_INLINE Vec load(int64_t row, int64_t column) const {
    return load_f32(data + row * row_stride + column);
  }
  HWY_INLINE Matrix from(int64_t row, int64_t column) const {
    return {data + row * row_stride + column, row_stride};
  }
};

// Codes with a scale for each row, or for all of them where they are 0 apart.
template <typename T>
struct ScaledRows {
  static constexpr bool kHasPairs = Matrix<T>::kHasPairs;

  Matrix<T> codes;
  const float* scales;
  ptrdiff_t scale_stride;

  HWY_INLINE VecPair load_pair(int64_t row, int64_t column) const {
    const VecPair pair = codes.load_pair(row, column);
    const auto scale = hn::Set(F32(), scales[row * scale_stride]);
    return {hn::Mul(pair.low, scale), hn::Mul(pair.high, scale)};
  }
  HWY_INLINE Vec load(int64_t row, int64_t column) const {
    return hn::Mul(codes.load(row, column), hn::Set(F32(), scales[row * scale_stride]));
  }
  HWY_INLINE ScaledRows from(int64_t row, int64_t column) const {
    return {codes.from(row, column), scales + row * scale_stride, scale_stride};
  }
};

// Codes with a scale for each column, side by side.
template <typename T>
struct ScaledColumns {
  static constexpr bool kHasPairs = Matrix<T>::kHasPairs;

  Matrix<T> codes;
  const float* scales;

  HWY_INLINE VecPair load_pair(int64_t row, int64_t column) const {
    const VecPair pair = codes.load_pair(row, column);
    const auto lanes = static_cast<int64_t>(hn::Lanes(F32()));
    return {hn::Mul(pair.low, hn::LoadU(F32(), scales + column)),
            hn::Mul(pair.high, hn::LoadU(F32(), scales + column + lanes))};
  }
  HWY_INLINE Vec load(int64_t row, int64_t column) const {
    return hn::Mul(codes.load(row, column), hn::LoadU(F32(), scales + column));
  }
  HWY_INLINE ScaledColumns from(int64_t row, int64_t column) const {
    return {codes.from(row, column), scales + column};
  }
};

HWY_INLINE Vec load_f32(const Q8_0& block, int64_t idx) {
  return hn::Mul(load_f32(reinterpret_cast<const Int8*>(block.codes + idx)),
                 broadcast_f32(block.scale));
}
HWY_INLINE Vec load_f32(const Q4_0& block, int64_t idx) {
  constexpr int64_t kHalf = kBlockElements / 2;
  const hn::Rebind<uint8_t, F32> u8;
  const I32 i32;
  const int bits = idx < kHalf ? 0 : 4;
  const auto bytes = hn::PromoteTo(i32, hn::LoadU(u8, block.codes + idx % kHalf));
  const auto code = hn::And(hn::ShiftRightSame(bytes, bits), hn::Set(i32, 15));
  return hn::Mul(hn::ConvertTo(F32(), hn::Sub(code, hn::Set(i32, 8))), broadcast_f32(block.scale));
}

// Blocks along the row.
template <typename Block>
struct BlockRows {
  static constexpr bool kHasPairs = kPairsAreWorthIt;

  const Block* data;
  ptrdiff_t row_stride;  // in blocks
  int64_t first_column;

  HWY_INLINE VecPair load_pair(int64_t row, int64_t column) const {
    const int64_t block = (first_column + column) / kBlockElements;
    return HWY_NAMESPACE::load_pair(data[row * row_stride + block]);
  }
  HWY_INLINE Vec load(int64_t row, int64_t column) const {
    const int64_t at = first_column + column;
    return load_f32(data[row * row_stride + at / kBlockElements], at % kBlockElements);
  }
  HWY_INLINE BlockRows from(int64_t row, int64_t column) const {
    return {data + row * row_stride, row_stride, first_column + column};
  }
};

// Whether load() can have all of a row.
inline bool is_whole_vectors(const KvTensor& tensor) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(F32()));
  const bool has_columns_apart =
      tensor.scales == Scales::kChannel && tensor.dim > 1 && tensor.stride_scales[3] != 1;
  return tensor.stride[3] == 1 && tensor.dim % lanes == 0 && !has_columns_apart;
}

template <typename T, typename Body>
HWY_INLINE void with_codes(const KvTensor& tensor, const KvPlace& first, const Body& body) {
  const Matrix<T> codes{static_cast<const T*>(tensor.data) + tensor.offset(first),
                        tensor.stride[2]};
  static constexpr float kOne = 1;
  if (tensor.scales_data == nullptr) return body(ScaledRows<T>{codes, &kOne, 0});
  const float* scales = tensor.scales_data + tensor.scale_offset(first);
  if (tensor.scales == Scales::kChannel) return body(ScaledColumns<T>{codes, scales});
  const bool is_of_token = tensor.scales == Scales::kTokenHead;
  body(ScaledRows<T>{codes, scales, is_of_token ? tensor.stride_scales[2] : 0});
}

template <typename Block, typename Body>
HWY_INLINE void with_blocks(const KvTensor& tensor, const KvPlace& first, const Body& body) {
  body(BlockRows<Block>{
      static_cast<const Block*>(tensor.data) + tensor.offset(first) / kBlockElements,
      tensor.stride[2] / kBlockElements, 0});
}

// Calls body(rows) with the rows from `first` on.
template <typename Body>
HWY_INLINE void with_rows(const KvTensor& tensor, const KvPlace& first, const Body& body) {
  switch (tensor.format) {
    case Quantised::kNone:
      return with_element_type(tensor.dtype, [&]<typename T>(T) HWY_ATTR {
        body(
            Matrix<T>{static_cast<const T*>(tensor.data) + tensor.offset(first), tensor.stride[2]});
      });
    case Quantised::kE4m3:
      return with_codes<E4m3>(tensor, first, body);
    case Quantised::kInt8:
      return with_codes<Int8>(tensor, first, body);
    case Quantised::kQ8_0:
      return with_blocks<Q8_0>(tensor, first, body);
    case Quantised::kQ4_0:
      return with_blocks<Q4_0>(tensor, first, body);
  }
}

// Widens rows from `first` on into rows of `columns`, zero-filled. Answers whether every element is
// finite: only then may a masked key be left to a weight of zero.
inline bool widen_rows(const KvTensor& tensor, KvPlace first, int64_t rows, int64_t columns,
                       float* HWY_RESTRICT to) {
  const F32 f32;
  const auto zero = hn::Zero(f32);
  if (tensor.format == Quantised::kNone) {
    return widen_rows(tensor.data, tensor.dtype, tensor.offset(first), tensor.stride, rows,
                      tensor.dim, columns, to);
  }
  float finite_tail = 0;
  if (!is_whole_vectors(tensor)) {
    for (int64_t i = 0; i < rows; ++i, ++first.key_idx, to += columns) {
      for (int64_t d = 0; d < columns; ++d) {
        to[d] = d < tensor.dim ? tensor.element(first, d) : 0.0f;
        finite_tail += to[d] * 0.0f;
      }
    }
    return finite_tail == 0.0f;
  }
  auto finite = zero;
  with_rows(tensor, first, [&](const auto& stored) HWY_ATTR {
    const auto lanes = static_cast<int64_t>(hn::Lanes(f32));
    for (int64_t i = 0; i < rows; ++i, to += columns) {
      for (int64_t d = 0; d < tensor.dim; d += lanes) {
        const auto x = stored.load(i, d);
        finite = hn::MulAdd(x, zero, finite);
        hn::StoreU(x, f32, to + d);
      }
      for (int64_t d = tensor.dim; d < columns; ++d) to[d] = 0.0f;
    }
  });
  return hn::AllTrue(f32, hn::Eq(finite, zero));
}

// Keys of one head of one sequence, wherever they lie.
struct HeadKeys {
  const KeyRows& rows;
  const Sequence& sequence;
  int64_t head_kv;
  KeyRange keys;
};

// As widen_rows(), run by run.
inline bool widen_keys(const KvTensor& tensor, const HeadKeys& from, int64_t columns, float* to) {
  bool is_finite = true;
  for (int64_t key = from.keys.begin; key < from.keys.end;) {
    const int64_t run = from.rows.run(key, from.keys.end);
    const KvPlace first = place_of(from.rows, from.sequence, from.head_kv, key);
    is_finite &= widen_rows(tensor, first, run, columns, to);
    to += run * columns;
    key += run;
  }
  return is_finite;
}

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
