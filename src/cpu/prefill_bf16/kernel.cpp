// cpu_prefill_bf16: cpu_prefill with the products on AVX512-BF16.
//
// Schedule: as cpu_prefill. K is read in place where its rows are pairs already (a dword of a row
// is two neighbouring dimensions, broadcast as it lies), V is interleaved by pairs of keys once a
// tile, and weights become pairs of bf16: rounded, or as a rounded and a remaining half, which
// doubles the second product but keeps f32-class accuracy. The scale is applied after the product,
// so queries stay exact.
//
// Roofline: 2 * (dim_qk + dim_v) flops a pair at the rate of VDPBF16PS: twice the f32 peak on AMD
// Zen 5, half of it on Intel Sapphire Rapids, where the planner therefore takes cpu_prefill.
#include "cpu/prefill_bf16/kernel.h"

#include <fmt/format.h>

#include <cstring>

#include "cpu/common/simd.h"
#include "cpu/prefill/kernel.h"
#include "cpu/prefill_bf16/products.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/prefill_bf16/kernel.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep
#include <hwy/highway.h>

#include "cpu/prefill/worker-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET <= HWY_AVX3

// Rounds weights to bf16, still held as f32; ties go away from zero. A NaN may become a number
// here, but not in the row's sum, which every output of the row is divided by.
HWY_INLINE Vec round_to_bf16(Vec x) {
  const hn::RebindToUnsigned<F32> u32;
  const auto bits = hn::Add(hn::BitCast(u32, x), hn::Set(u32, 0x8000));
  return hn::BitCast(F32(), hn::And(bits, hn::Set(u32, 0xffff0000)));
}

// Two vectors of bf16 values held as f32, as pairs.
HWY_INLINE Vec pairs_of(Vec even, Vec odd) {
  const hn::RebindToUnsigned<F32> u32;
  return hn::BitCast(F32(),
                     hn::Or(hn::ShiftRight<16>(hn::BitCast(u32, even)), hn::BitCast(u32, odd)));
}

inline float half_of_pair(float pair, bool is_odd) {
  uint32_t bits;
  std::memcpy(&bits, &pair, sizeof(bits));
  return to_float(Bfloat16{static_cast<uint16_t>(is_odd ? bits >> 16 : bits)});
}

class Bf16Products {
 public:
  Bf16Products(const Problem& p, const Tensors& t, const PrefillScratch& scratch)
      : p_(p), t_(t), w_(scratch), scale_(scale_to_base_2(p)) {}

  void load_query(const void* row, float* to) const {
    copy_pairs(static_cast<const uint16_t*>(row), p_.stride_q[3], p_.dim_qk, to);
  }

  bool load_tile(const Sequence&, const KeyRows& key_rows, int64_t head_kv, KeyRange tile) {
    const auto row = [&](const void* data, const Strides& stride, int64_t key) {
      return static_cast<const uint16_t*>(data) + head_kv * stride[1] +
             key_rows.offset(stride[0], stride[2], key);
    };
    k_begin_ = tile.begin;
    const bool is_one_run = key_rows.run(tile.begin, tile.end) == tile.size();
    if (is_one_run && p_.stride_k[3] == 1 && p_.dim_qk % 2 == 0) {
      k_ = row(t_.k, p_.stride_k, tile.begin);
      k_stride_ = p_.stride_k[2];
    } else {
      for (int64_t i = 0; i < tile.size(); ++i) {
        copy_pairs(row(t_.k, p_.stride_k, tile.begin + i), p_.stride_k[3], p_.dim_qk,
                   w_.k + i * w_.k_columns);
      }
      k_ = reinterpret_cast<const uint16_t*>(w_.k);
      k_stride_ = w_.k_columns * 2;
    }
    return interleave_values([&](int64_t key) { return row(t_.v, p_.stride_v, key); }, tile);
  }

  template <int kVectors>
  void scores(const float* q_panel, int64_t key, int64_t keys, float* s) const {
    bf16_scores({q_panel, k_ + (key - k_begin_) * k_stride_, k_stride_, keys, w_.q_rows, scale_, s},
                kVectors);
  }

  // The sum is of the weights before rounding: log-sum-exp keeps f32 accuracy.
  template <int kVectors>
  HWY_INLINE Vec keep(Vec even, Vec odd, int64_t row, int64_t vector) const {
    const F32 f32;
    const int64_t at = (row / 2 * kVectors + vector) * kBf16Lanes;
    const auto even_high = round_to_bf16(even), odd_high = round_to_bf16(odd);
    hn::Store(pairs_of(even_high, odd_high), f32, w_.s + at);
    if (w_.p_low != nullptr) {
      hn::Store(
          pairs_of(round_to_bf16(hn::Sub(even, even_high)), round_to_bf16(hn::Sub(odd, odd_high))),
          f32, w_.p_low + at);
    }
    return hn::Add(even, odd);
  }

  template <int kVectors>
  void values(int64_t key, int64_t keys, float* o) const {
    bf16_values({w_.s, w_.p_low, w_.v + (key - v_begin_) / 2 * w_.v_columns, w_.v_columns,
                 (keys + 1) / 2, (p_.dim_v + 7) / 8 * 8, w_.alpha, o},
                kVectors);
  }

  float weight(int64_t row, int64_t lane, int64_t width) const {
    const int64_t at = row / 2 * width + lane;
    const float low = w_.p_low == nullptr ? 0 : half_of_pair(w_.p_low[at], row % 2 != 0);
    return half_of_pair(w_.s[at], row % 2 != 0) + low;
  }

 private:
  // A row as dwords; an odd last element is paired with zero.
  static void copy_pairs(const uint16_t* from, int64_t stride, int64_t dim, float* to) {
    auto* halves = reinterpret_cast<unsigned char*>(to);
    if (stride == 1) {
      std::memcpy(halves, from, static_cast<size_t>(dim) * 2);
    } else {
      for (int64_t d = 0; d < dim; ++d) std::memcpy(halves + 2 * d, from + d * stride, 2);
    }
    if (dim % 2 != 0) std::memset(halves + 2 * dim, 0, 2);
  }

  // Rows 2i and 2i + 1 become row i of pairs; a row that the tile lacks is zero.
  template <typename RowOf>
  bool interleave_values(const RowOf& row_of, KeyRange tile) {
    v_begin_ = tile.begin / 2 * 2;
    bool is_finite = true;
    for (int64_t key = v_begin_; key < tile.end; key += 2) {
      const uint16_t* even = key < tile.begin ? nullptr : row_of(key);
      const uint16_t* odd = key + 1 < tile.end ? row_of(key + 1) : nullptr;
      float* pairs = w_.v + (key - v_begin_) / 2 * w_.v_columns;
      if (interleave(even, odd, pairs)) continue;
      is_finite = false;
      for (int64_t d = 0; d < p_.dim_v; ++d) zero_special_halves(pairs[d]);
    }
    return is_finite;
  }

  static void zero_special_halves(float& pair) {
    uint32_t bits;
    std::memcpy(&bits, &pair, sizeof(bits));
    for (const uint32_t half : {0xffffu, 0xffff0000u}) {
      const uint32_t exponent = 0x7f807f80u & half;
      if ((bits & exponent) == exponent) bits &= ~half;
    }
    std::memcpy(&pair, &bits, sizeof(bits));
  }

  bool interleave(const uint16_t* even, const uint16_t* odd, float* to) const {
    const F32 f32;
    const hn::RebindToUnsigned<F32> u32;
    const hn::Rebind<uint16_t, F32> u16;
    const auto zero = hn::Zero(f32);
    auto finite = zero;  // stays 0 while everything is finite
    int64_t d = 0;
    if (p_.stride_v[3] == 1) {
      for (; d + kBf16Lanes <= p_.dim_v; d += kBf16Lanes) {
        auto pair = hn::Zero(u32);
        if (even != nullptr) pair = hn::PromoteTo(u32, hn::LoadU(u16, even + d));
        finite = hn::MulAdd(hn::BitCast(f32, hn::ShiftLeft<16>(pair)), zero, finite);
        if (odd != nullptr) {
          const auto upper = hn::ShiftLeft<16>(hn::PromoteTo(u32, hn::LoadU(u16, odd + d)));
          finite = hn::MulAdd(hn::BitCast(f32, upper), zero, finite);
          pair = hn::Or(pair, upper);
        }
        hn::Store(hn::BitCast(f32, pair), f32, to + d);
      }
    }
    float finite_tail = 0;
    for (; d < p_.dim_v; ++d) {
      const uint32_t low = even == nullptr ? 0 : even[d * p_.stride_v[3]];
      const uint32_t high = odd == nullptr ? 0 : odd[d * p_.stride_v[3]];
      const uint32_t bits = low | high << 16;
      std::memcpy(to + d, &bits, sizeof(bits));
      finite_tail += half_of_pair(to[d], false) * 0.0f + half_of_pair(to[d], true) * 0.0f;
    }
    for (; d < w_.v_columns; ++d) to[d] = 0;
    return hn::AllTrue(f32, hn::Eq(finite, zero)) && finite_tail == 0.0f;
  }

  const Problem& p_;
  const Tensors& t_;
  const PrefillScratch& w_;
  const float scale_;
  const uint16_t* k_ = nullptr;  // the tile's first key
  ptrdiff_t k_stride_ = 0;       // in elements
  int64_t k_begin_ = 0, v_begin_ = 0;
};

void run_prefill_worker_bf16(const Problem& p, const Tensors& t, const PrefillWorkspace& workspace,
                             int32_t worker_idx, std::atomic<int64_t>& next, Progress& progress) {
  run_prefill_worker<Bf16Products>(p, t, workspace, worker_idx, next, progress);
}

RunPrefillWorker bf16_worker() { return run_prefill_worker_bf16; }

#else

RunPrefillWorker bf16_worker() { return nullptr; }

#endif

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wh::cpu {
HWY_EXPORT(bf16_worker);

Status run_prefill_bf16(const Launch& launch) {
  const RunPrefillWorker worker = HWY_DYNAMIC_DISPATCH(bf16_worker)();
  if (worker == nullptr) {  // the planner refuses before
    return {Code::kInternal,
            fmt::format("cpu_prefill_bf16 has no code for {}", simd_target_name())};
  }
  return run_prefill_items(launch, worker);
}

}  // namespace wh::cpu
#endif
