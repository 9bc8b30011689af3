// A tile of keys in a worker's scratch, with the sums of its dk and dv.
#if defined(WH_CPU_BACKWARD_KEY_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WH_CPU_BACKWARD_KEY_TILE_INL_H_
#undef WH_CPU_BACKWARD_KEY_TILE_INL_H_
#else
#define WH_CPU_BACKWARD_KEY_TILE_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>

#include "core/rounding.h"
#include "cpu/backward/head.h"
#include "cpu/backward/layout.h"
#include "cpu/common/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// 4 rows of `from`, or fewer where a panel is narrower, as neighbouring lanes of `to`.
inline void to_lanes(const float* from, ptrdiff_t from_stride, int64_t columns, float* to,
                     int64_t width) {
  if (width >= 4) return transpose_into_lanes(from, from_stride, columns, to, width);
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t i = 0; i < width; ++i) to[c * width + i] = from[i * from_stride + c];
  }
}

// Infinities and NaN become 0: a weight of zero would not hide them in a product.
inline void clear_special(float* row, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) row[d] = std::isfinite(row[d]) ? row[d] : 0.0f;
}

class KeyTile {
 public:
  KeyTile(const Problem& p, const Tensors& t, const BackwardShape& shape,
          const BackwardScratch& scratch)
      : p_(p), t_(t), shape_(shape), w_(scratch) {}

  // Keys and values in lanes, and keys as they lie in memory. What is not present is 0.
  void load(const BackwardHead& head, int64_t k_tile) {
    head_ = head;
    range_ = {k_tile * shape_.tile_k, std::min((k_tile + 1) * shape_.tile_k, head.keys)};
    is_finite_ = true;
    for (int64_t panel = 0; panel < panels(); ++panel) {
      for (int64_t lane = 0; lane < width(panel); lane += 4) load_lanes(panel, lane);
    }
  }

  void clear_gradients() {
    for (int64_t panel = 0; panel < panels(); ++panel) {
      std::fill_n(dk(panel), padded_dim(p_.dim_qk) * width(panel), 0.0f);
      std::fill_n(dv(panel), padded_dim(p_.dim_v) * width(panel), 0.0f);
    }
  }

  void store_gradients() const {
    for (int64_t panel = 0; panel < panels(); ++panel) {
      const KeyRange keys = keys_of(panel);
      for (int64_t lane = 0; lane < keys.size(); ++lane) store(panel, lane, keys.begin + lane);
    }
  }

  // Widens a row of K or V. Answers whether it is finite.
  bool widen(int64_t key, const void* data, const Strides& stride, int64_t dim, float* to) const {
    return widen_row(data, p_.dtype_kv, head_.key_offset(stride, key), stride[3], dim, to);
  }

  const BackwardHead& head() const { return head_; }
  KeyRange range() const { return range_; }
  bool is_finite() const { return is_finite_; }  // K: a value is in no product of a weight

  int64_t panels() const { return divide_up(range_.size(), shape_.lanes); }
  // The last panel takes as few vectors as hold its keys.
  int64_t vectors(int64_t panel) const {
    const int64_t keys = std::min(shape_.lanes, range_.size() - panel * shape_.lanes);
    return divide_up(keys, vector_lanes());
  }
  int64_t width(int64_t panel) const { return vectors(panel) * vector_lanes(); }
  KeyRange keys_of(int64_t panel) const {
    const int64_t begin = range_.begin + panel * shape_.lanes;
    return {begin, std::min(begin + width(panel), range_.end)};
  }

  float* rows(int64_t panel) const { return w_.k + panel * shape_.lanes * w_.k_columns; }
  ptrdiff_t row_stride() const { return w_.k_columns; }
  float* k(int64_t panel) const { return w_.k_lanes + panel * p_.dim_qk * shape_.lanes; }
  float* v(int64_t panel) const { return w_.v_lanes + panel * p_.dim_v * shape_.lanes; }
  float* dk(int64_t panel) const {
    return w_.dk_lanes + panel * padded_dim(p_.dim_qk) * shape_.lanes;
  }
  float* dv(int64_t panel) const {
    return w_.dv_lanes + panel * padded_dim(p_.dim_v) * shape_.lanes;
  }

 private:
  static int64_t vector_lanes() { return static_cast<int64_t>(hn::Lanes(F32())); }

  void load_lanes(int64_t panel, int64_t lane) {
    const int64_t slot = panel * shape_.lanes + lane;
    const int64_t keys = std::min<int64_t>(4, width(panel));
    float* k_rows = w_.k + slot * w_.k_columns;
    bool is_finite = true;
    for (int64_t i = 0; i < keys; ++i) {
      is_finite &= load_key(slot + i, k_rows + i * w_.k_columns, w_.staged + i * w_.staged_columns);
    }
    to_lanes(k_rows, w_.k_columns, p_.dim_qk, k(panel) + lane, width(panel));
    to_lanes(w_.staged, w_.staged_columns, p_.dim_v, v(panel) + lane, width(panel));
    if (is_finite) return;
    is_finite_ = false;
    for (int64_t i = 0; i < keys; ++i) clear_special(k_rows + i * w_.k_columns, p_.dim_qk);
  }

  bool load_key(int64_t slot, float* k, float* v) const {
    const int64_t key = range_.begin + slot;
    std::fill_n(k + p_.dim_qk, w_.k_columns - p_.dim_qk, 0.0f);
    if (key < head_.present().begin || key >= head_.present().end) {
      std::fill_n(k, p_.dim_qk, 0.0f);
      std::fill_n(v, p_.dim_v, 0.0f);
      return true;
    }
    widen(key, t_.v, p_.stride_v, p_.dim_v, v);
    return widen(key, t_.k, p_.stride_k, p_.dim_qk, k);
  }

  void store(int64_t panel, int64_t lane, int64_t key) const {
    // Queries were multiplied by scale_to_base_2(): what the scale has more than that is left.
    const float scale = p_.softcap > 0 ? p_.softcap : kLn2;
    const int64_t lanes = width(panel);
    float* dk_row = w_.staged;
    float* dv_row = w_.staged + w_.staged_columns;
    for (int64_t d = 0; d < p_.dim_qk; ++d) dk_row[d] = dk(panel)[d * lanes + lane] * scale;
    for (int64_t d = 0; d < p_.dim_v; ++d) dv_row[d] = dv(panel)[d * lanes + lane];
    if (p_.values_in_keys) {
      for (int64_t d = 0; d < p_.dim_v; ++d) dk_row[d] += dv_row[d];
    } else {
      store_scaled(dv_row, 1, p_.dim_v, t_.dv, p_.dtype_kv, head_.key_offset(p_.stride_dv, key),
                   p_.stride_dv[3]);
    }
    store_scaled(dk_row, 1, p_.dim_qk, t_.dk, p_.dtype_kv, head_.key_offset(p_.stride_dk, key),
                 p_.stride_dk[3]);
  }

  const Problem& p_;
  const Tensors& t_;
  const BackwardShape& shape_;
  const BackwardScratch& w_;
  BackwardHead head_;
  KeyRange range_{0, 0};
  bool is_finite_ = true;
};

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
