// The rare tile with infinities or NaN: a weight of zero would not hide them, so the products read
// 0 in their place, and what sees them gets them here, element by element.
#if defined(WH_CPU_BACKWARD_SPECIAL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WH_CPU_BACKWARD_SPECIAL_INL_H_
#undef WH_CPU_BACKWARD_SPECIAL_INL_H_
#else
#define WH_CPU_BACKWARD_SPECIAL_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>

#include "cpu/backward/key_tile-inl.h"
#include "cpu/backward/row_tile-inl.h"
#include "cpu/backward/weights-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

class SpecialValues {
 public:
  SpecialValues(const Problem& p, const Tensors& t, const BackwardScratch& scratch,
                const RowTile& rows, const KeyTile& keys, const Weights& weights)
      : p_(p), t_(t), w_(scratch), rows_(rows), keys_(keys), weights_(weights) {}

  // Before the products of dk and dv; what the rows held, loading them once more brings back.
  void clear_rows() const {
    for (int64_t r = 0; r < rows_.count(); ++r) {
      clear_special(rows_.q(r), p_.dim_qk);
      clear_special(rows_.d_out(r), p_.dim_v);
    }
  }

  // What rows as they were loaded add to dk and dv.
  void add_rows(int64_t panel) const {
    const KeyRange keys = keys_.keys_of(panel);
    const int64_t width = keys_.width(panel);
    for (int64_t r = 0; r < rows_.count(); ++r) {
      for (int64_t lane = 0; lane < keys.size(); ++lane) {
        if (!rows_.sees(r, keys.begin + lane)) continue;
        const auto add = [&](const float* row, int64_t dim, float weight, float* to) {
          for (int64_t d = 0; d < dim; ++d) {
            if (!std::isfinite(row[d])) to[d * width + lane] += weight * row[d];
          }
        };
        const int64_t i = r * width + lane;
        add(rows_.q(r), p_.dim_qk, weights_.gradients(panel)[i], keys_.dk(panel));
        add(rows_.d_out(r), p_.dim_v, weights_.values()[i], keys_.dv(panel));
      }
    }
  }

  // What keys add to dq.
  void add_keys(int64_t panel) const {
    float* k = w_.staged;
    const KeyRange present = keys_.head().present(), keys = keys_.keys_of(panel);
    for (int64_t key = std::max(keys.begin, present.begin); key < std::min(keys.end, present.end);
         ++key) {
      if (keys_.widen(key, t_.k, p_.stride_k, p_.dim_qk, k)) continue;
      for (int64_t r = 0; r < rows_.count(); ++r) {
        if (!rows_.sees(r, key)) continue;
        const float weight = weights_.gradients(panel)[r * keys_.width(panel) + key - keys.begin];
        for (int64_t d = 0; d < p_.dim_qk; ++d) {
          if (!std::isfinite(k[d])) rows_.dq(r)[d] += weight * k[d];
        }
      }
    }
  }

 private:
  const Problem& p_;
  const Tensors& t_;
  const BackwardScratch& w_;
  const RowTile& rows_;
  const KeyTile& keys_;
  const Weights& weights_;
};

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
