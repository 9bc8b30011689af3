// exp2 and tanh on Highway vectors, and the conversions from and to f16 and bf16. Re-included per
// target.
#if defined(WH_CPU_VECTOR_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WH_CPU_VECTOR_MATH_INL_H_
#undef WH_CPU_VECTOR_MATH_INL_H_
#else
#define WH_CPU_VECTOR_MATH_INL_H_
#endif

#include <hwy/highway.h>

#include <limits>

#include "core/float16.h"
#include "core/problem.h"
#include "core/score_rules.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::ScalableTag<float>;
using I32 = hn::RebindToSigned<F32>;
using Vec = hn::Vec<F32>;

// 2^x for x <= 0, exactly 0 below -126 (no denormals) and for minus infinity; NaN stays NaN.
// Degree 6 interpolated at Chebyshev nodes on [-0.5, 0.5]: relative error 2e-8 before rounding.
HWY_INLINE Vec exp2_fraction(Vec r) {
  const F32 f32;
  auto y = hn::MulAdd(hn::Set(f32, 1.54614449e-4f), r, hn::Set(f32, 1.34004280e-3f));
  y = hn::MulAdd(y, r, hn::Set(f32, 9.61805694e-3f));
  y = hn::MulAdd(y, r, hn::Set(f32, 5.55032715e-2f));
  y = hn::MulAdd(y, r, hn::Set(f32, 2.40226507e-1f));
  y = hn::MulAdd(y, r, hn::Set(f32, 6.93147182e-1f));
  return hn::MulAdd(y, r, hn::Set(f32, 1.0f));
}

#if HWY_TARGET <= HWY_AVX3
// VREDUCEPS and VSCALEFPS do in one instruction each what takes two and five elsewhere.
HWY_INLINE Vec exp2_nonpositive(Vec x) {
  const Vec r{_mm512_reduce_ps(x.raw, 0)};
  const Vec y = exp2_fraction(r);
  const auto keep = _mm512_cmp_ps_mask(x.raw, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return Vec{_mm512_maskz_scalef_ps(keep, y.raw, _mm512_sub_ps(x.raw, r.raw))};
}
#else
HWY_INLINE Vec exp2_nonpositive(Vec x) {
  const F32 f32;
  const I32 i32;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const auto magic = hn::Set(f32, 12582912.0f);
  const auto shifted = hn::Add(x, magic);
  const auto y = exp2_fraction(hn::Sub(x, hn::Sub(shifted, magic)));
  // A product and not an addition to the exponent bits: those would turn a NaN into a number.
  const auto exponent = hn::ShiftLeft<23>(hn::Add(hn::BitCast(i32, shifted), hn::Set(i32, 127)));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(f32, -126.0f)),
                            hn::Mul(y, hn::BitCast(f32, exponent)));
}
#endif

// a / b for b in [1, 2^20]. A division takes 16 cycles on AVX-512, as long as the rest of tanh.
HWY_INLINE Vec divide(Vec a, Vec b) {
#if HWY_TARGET <= HWY_AVX3
  const Vec r{_mm512_rcp14_ps(b.raw)};  // 14 bits, one step of Newton makes them 28
  return hn::Mul(a, hn::Mul(r, hn::NegMulAdd(b, r, hn::Set(F32(), 2.0f))));
#else
  return hn::Div(a, b);
#endif
}

// x P(x^2) / Q(x^2), degrees 4 and 4, fitted to the smallest relative error on [-8.7, 8.7]: 1.5e-8
// before rounding, 3e-7 after. Beyond, tanh rounds to 1.
HWY_INLINE Vec tanh_vector(Vec x) {
  const F32 f32;
  // Not a minimum and maximum: ARM's drop a NaN.
  const auto limit = hn::Set(f32, 8.7f);
  x = hn::IfThenElse(hn::Gt(hn::Abs(x), limit), hn::CopySign(limit, x), x);
  const auto u = hn::Mul(x, x);
  auto p = hn::MulAdd(hn::Set(f32, 1.3897731e-8f), u, hn::Set(f32, 2.09939081e-5f));
  p = hn::MulAdd(p, u, hn::Set(f32, 3.51874880e-3f));
  p = hn::MulAdd(p, u, hn::Set(f32, 1.34004712e-1f));
  p = hn::MulAdd(p, u, hn::Set(f32, 1.0f));
  auto q = hn::MulAdd(hn::Set(f32, 7.99656959e-7f), u, hn::Set(f32, 3.32365569e-4f));
  q = hn::MulAdd(q, u, hn::Set(f32, 2.59649120e-2f));
  q = hn::MulAdd(q, u, hn::Set(f32, 4.67337906e-1f));
  q = hn::MulAdd(q, u, hn::Set(f32, 1.0f));
  return divide(hn::Mul(x, p), q);
}

// limited_bias() of each lane.
HWY_INLINE Vec limited_biases(Vec bias) {
  const F32 f32;
  const auto size = hn::Abs(bias);
  const auto limited = hn::CopySign(hn::Min(size, hn::Set(f32, kLargestBias)), bias);
  const auto is_finite = hn::Lt(size, hn::Set(f32, std::numeric_limits<float>::infinity()));
  return hn::IfThenElse(is_finite, limited, bias);
}

HWY_INLINE Vec load_f32(const float* from) { return hn::LoadU(F32(), from); }
#if (HWY_ARCH_X86 && HWY_TARGET > HWY_AVX2) || HWY_TARGET == HWY_EMU128 || HWY_TARGET == HWY_SCALAR
// Without an instruction for it Highway 1.0 truncates, and turns infinity and NaN into numbers.
// As to_float() and from_float().
HWY_INLINE Vec load_f32(const Half* from) {
  const hn::Rebind<uint16_t, F32> u16;
  const hn::RebindToUnsigned<F32> u32;
  const auto bits = hn::PromoteTo(u32, hn::LoadU(u16, reinterpret_cast<const uint16_t*>(from)));
  const auto magnitude = hn::And(bits, hn::Set(u32, 0x7fffu));
  const auto scaled = hn::BitCast(
      u32, hn::Mul(hn::BitCast(F32(), hn::ShiftLeft<13>(magnitude)), hn::Set(F32(), 0x1p112f)));
  const auto is_special = hn::Gt(magnitude, hn::Set(u32, 0x7bffu));
  const auto exponent = hn::IfThenElseZero(is_special, hn::Set(u32, 0x7f800000u));
  const auto sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(u32, 0x8000u)));
  return hn::BitCast(F32(), hn::Or(hn::Or(scaled, exponent), sign));
}

HWY_INLINE void store_as(Vec value, Half* to) {
  const hn::RebindToUnsigned<F32> u32;
  const hn::Rebind<uint16_t, F32> u16;
  const auto bits = hn::BitCast(u32, value);
  const auto magnitude = hn::And(bits, hn::Set(u32, 0x7fffffffu));
  const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(u32, 1));
  const auto rounded = hn::Add(hn::Add(magnitude, odd), hn::Set(u32, 0xfffu - 0x38000000u));
  const auto normal = hn::ShiftRight<13>(rounded);
  // Subnormal results: the adder rounds at 2^-24.
  const auto shifted = hn::Add(hn::BitCast(F32(), magnitude), hn::Set(F32(), 0.5f));
  const auto subnormal = hn::Sub(hn::BitCast(u32, shifted), hn::Set(u32, 0x3f000000u));
  auto half = hn::IfThenElse(hn::Gt(hn::Set(u32, 0x38800000u), magnitude), subnormal, normal);
  half = hn::IfThenElse(hn::Gt(magnitude, hn::Set(u32, 0x477fefffu)), hn::Set(u32, 0x7c00u), half);
  half = hn::IfThenElse(hn::Gt(magnitude, hn::Set(u32, 0x7f800000u)), hn::Set(u32, 0x7e00u), half);
  half = hn::Or(half, hn::And(hn::ShiftRight<16>(bits), hn::Set(u32, 0x8000u)));
  hn::StoreU(hn::DemoteTo(u16, hn::BitCast(I32(), half)), u16, reinterpret_cast<uint16_t*>(to));
}
#else
HWY_INLINE Vec load_f32(const Half* from) {
  const hn::Rebind<hwy::float16_t, F32> f16;
  return hn::PromoteTo(F32(), hn::LoadU(f16, reinterpret_cast<const hwy::float16_t*>(from)));
}
HWY_INLINE void store_as(Vec value, Half* to) {
  const hn::Rebind<hwy::float16_t, F32> f16;
  hn::StoreU(hn::DemoteTo(f16, value), f16, reinterpret_cast<hwy::float16_t*>(to));
}
#endif

HWY_INLINE Vec load_f32(const Bfloat16* from) {
  const hn::Rebind<uint16_t, F32> u16;
  const hn::RebindToUnsigned<F32> u32;
  const auto bits = hn::LoadU(u16, reinterpret_cast<const uint16_t*>(from));
  return hn::BitCast(F32(), hn::ShiftLeft<16>(hn::PromoteTo(u32, bits)));
}

// A switch of its own: a vector cannot be returned through with_element_type(), which is compiled
// for every CPU.
HWY_INLINE Vec load_f32(const void* from, Dtype dtype, int64_t offset) {
  switch (dtype) {
    case Dtype::kF32:
      return load_f32(static_cast<const float*>(from) + offset);
    case Dtype::kF16:
      return load_f32(static_cast<const Half*>(from) + offset);
    case Dtype::kBf16:
      return load_f32(static_cast<const Bfloat16*>(from) + offset);
  }
  __builtin_unreachable();
}

HWY_INLINE void store_as(Vec value, float* to) { hn::StoreU(value, F32(), to); }
// To nearest even. A NaN keeps its sign and its upper payload, with the quiet bit set. Not by
// Ne(value, value): Highway 1.0's is false for a NaN on AVX2 and AVX-512.
HWY_INLINE void store_as(Vec value, Bfloat16* to) {
  const hn::RebindToUnsigned<F32> u32;
  const hn::Rebind<uint16_t, F32> u16;
  const auto bits = hn::BitCast(u32, value);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(u32, 1));
  const auto rounded = hn::Add(hn::Add(bits, odd), hn::Set(u32, 0x7fff));
  const auto quiet = hn::Or(bits, hn::Set(u32, 0x400000));
  const auto is_nan = hn::RebindMask(u32, hn::IsNaN(value));
  const auto upper = hn::ShiftRight<16>(hn::IfThenElse(is_nan, quiet, rounded));
  hn::StoreU(hn::DemoteTo(u16, hn::BitCast(I32(), upper)), u16, reinterpret_cast<uint16_t*>(to));
}

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
