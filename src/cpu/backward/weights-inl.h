// A row tile against a panel of keys: scores, the weights they become, and their gradients.
#if defined(WH_CPU_BACKWARD_WEIGHTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WH_CPU_BACKWARD_WEIGHTS_INL_H_
#undef WH_CPU_BACKWARD_WEIGHTS_INL_H_
#else
#define WH_CPU_BACKWARD_WEIGHTS_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <limits>

#include "cpu/backward/key_tile-inl.h"
#include "cpu/backward/row_tile-inl.h"
#include "cpu/common/tile-inl.h"
#include "cpu/common/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

class Weights {
 public:
  Weights(const Problem& p, const Tensors& t, const BackwardShape& shape,
          const BackwardScratch& scratch, const RowTile& rows, const KeyTile& keys)
      : p_(p), t_(t), shape_(shape), w_(scratch), rows_(rows), keys_(keys) {}

  // The rows' scores in base 2, minus infinity where an array mask hides the key; visible() is left
  // to the caller.
  template <int kVectors>
  void score(int64_t panel) {
    score_rows<kVectors>(panel);
    finish_scores(panel, kVectors * vector_lanes(), /*has_gradients=*/false);
  }

  // The rows' weights, and the gradients of their scores in front of the scale.
  template <int kVectors>
  void weigh(int64_t panel) {
    const int64_t width = kVectors * vector_lanes();
    score_rows<kVectors>(panel);
    for (int64_t r = 0; r < rows_.padded_count(); r += kTileRows) {
      score_tile<kVectors>(keys_.v(panel), rows_.d_out(r), rows_.d_out_stride(), p_.dim_v,
                           gradients(panel) + r * width);
    }
    finish_scores(panel, width, /*has_gradients=*/true);
    for (int64_t r = 0; r < rows_.padded_count(); ++r) weigh_row<kVectors>(panel, r);
  }

  float* values() const { return w_.weights; }  // [tile_q, width of the panel]
  // Of every panel, until the rows are done.
  float* gradients(int64_t panel) const {
    return w_.d_scores + panel * shape_.tile_q * shape_.lanes;
  }

  // Lanes whose keys lie in the row's range.
  HWY_INLINE auto visible(int64_t panel, int64_t r, int64_t vector) const {
    const I32 i32;
    const int64_t key = keys_.range().begin + panel * shape_.lanes + vector * vector_lanes();
    const auto keys = hn::Iota(i32, static_cast<int32_t>(key));
    const auto is_begun = hn::Gt(keys, hn::Set(i32, rows_.first_key(r) - 1));
    return hn::RebindMask(F32(), hn::And(is_begun, hn::Gt(hn::Set(i32, rows_.end_key(r)), keys)));
  }

 private:
  static constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

  static int64_t vector_lanes() { return static_cast<int64_t>(hn::Lanes(F32())); }

  // In base 2, but for softcap and masks.
  template <int kVectors>
  void score_rows(int64_t panel) {
    const int64_t width = kVectors * vector_lanes();
    for (int64_t r = 0; r < rows_.padded_count(); r += kTileRows) {
      score_tile<kVectors>(keys_.k(panel), rows_.q(r), rows_.q_stride(), p_.dim_qk,
                           w_.weights + r * width);
    }
  }

  // Softcap and array mask; a key that the mask hides scores minus infinity. A function of its own,
  // so that whoever reads the scores reads the same rounded ones.
  HWY_NOINLINE void finish_scores(int64_t panel, int64_t width, bool has_gradients) {
    const F32 f32;
    const bool has_mask = p_.mask != MaskKind::kNone;
    if (has_mask) load_bias(panel, width);
    if (!has_mask && p_.softcap == 0) return;
    const auto cap = hn::Set(f32, p_.softcap * kLog2E);
    const auto one = hn::Set(f32, 1.0f), masked = hn::Set(f32, kMinusInfinity);
    for (int64_t r = 0; r < rows_.count(); ++r) {
      const auto delta = hn::Set(f32, rows_.delta(r));
      for (int64_t i = r * width; i < (r + 1) * width; i += vector_lanes()) {
        auto score = hn::Load(f32, w_.weights + i);
        if (p_.softcap > 0) {
          const auto capped = tanh_vector(score);
          score = hn::Mul(capped, cap);
          if (has_gradients) {
            float* ds = gradients(panel) + i;
            const auto gradient = hn::Sub(hn::Load(f32, ds), delta);
            hn::Store(hn::Mul(gradient, hn::NegMulAdd(capped, capped, one)), f32, ds);
          }
        }
        if (has_mask) {
          const auto bias = hn::Load(f32, w_.bias + i);
          score = hn::IfThenElse(hn::Eq(bias, masked), masked, hn::Add(score, bias));
        }
        hn::Store(score, f32, w_.weights + i);
      }
    }
  }

  void load_bias(int64_t panel, int64_t width) {
    const KeyRange keys = keys_.keys_of(panel);
    for (int64_t r = 0; r < rows_.count(); ++r) {
      float* to = w_.bias + r * width;
      const bool is_shared =
          r > 0 && p_.stride_mask[1] == 0 && rows_.query_of(r) == rows_.query_of(r - 1);
      if (is_shared) {
        std::copy_n(to - width, width, to);
        continue;
      }
      load_mask_row(p_, t_.mask, rows_.head().sequence.batch_idx, rows_.head_of(r),
                    rows_.query_of(r), keys.begin, keys.size(), to);
      std::fill_n(to + keys.size(), width - keys.size(), 0.0f);
    }
  }

  // Scores become weights, and d_out v the gradient of the scores in front of the scale:
  // weight * (d_out v - delta), times the slope of the softcap.
  template <int kVectors>
  HWY_INLINE void weigh_row(int64_t panel, int64_t r) {
    const F32 f32;
    const int64_t lanes = vector_lanes(), width = kVectors * lanes;
    float* s = w_.weights + r * width;
    float* ds = gradients(panel) + r * width;
    const int64_t key = keys_.range().begin + panel * shape_.lanes;
    const int64_t first = rows_.first_key(r), end = rows_.end_key(r);
    if (end <= key || first >= key + width || first >= end) {
      std::fill_n(s, width, 0.0f);
      std::fill_n(ds, width, 0.0f);
      return;
    }
    const bool is_edge = first > key || end < key + width;
    const auto shift = hn::Set(f32, rows_.shift(r));
    const auto factor = hn::Set(f32, rows_.factor(r));
    const auto delta = hn::Set(f32, p_.softcap > 0 ? 0.0f : rows_.delta(r));
    for (int c = 0; c < kVectors; ++c) {
      const auto score = hn::Load(f32, s + c * lanes);
      auto weight = hn::Mul(exp2_nonpositive(hn::Sub(score, shift)), factor);
      auto gradient = hn::Mul(hn::Sub(hn::Load(f32, ds + c * lanes), delta), weight);
      if (p_.mask != MaskKind::kNone) {
        const auto is_hidden = hn::Eq(score, hn::Set(f32, kMinusInfinity));
        weight = hn::IfThenZeroElse(is_hidden, weight);
        gradient = hn::IfThenZeroElse(is_hidden, gradient);
      }
      if (is_edge) {
        const auto is_visible = visible(panel, r, c);
        weight = hn::IfThenElseZero(is_visible, weight);
        gradient = hn::IfThenElseZero(is_visible, gradient);
      }
      hn::Store(weight, f32, s + c * lanes);
      hn::Store(gradient, f32, ds + c * lanes);
    }
  }

  const Problem& p_;
  const Tensors& t_;
  const BackwardShape& shape_;
  const BackwardScratch& w_;
  const RowTile& rows_;
  const KeyTile& keys_;
};

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
