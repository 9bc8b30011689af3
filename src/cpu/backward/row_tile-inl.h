// A tile of rows: queries and d_out in a worker's scratch, what workers share about them, and dq.
#if defined(WH_CPU_BACKWARD_ROW_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WH_CPU_BACKWARD_ROW_TILE_INL_H_
#undef WH_CPU_BACKWARD_ROW_TILE_INL_H_
#else
#define WH_CPU_BACKWARD_ROW_TILE_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <limits>

#include "core/array_mask.h"
#include "cpu/backward/head.h"
#include "cpu/backward/layout.h"
#include "cpu/common/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

class RowTile {
 public:
  RowTile(const Problem& p, const Tensors& t, const BackwardWorkspace& workspace,
          const BackwardScratch& scratch)
      : p_(p), t_(t), shared_(workspace), shape_(workspace.shape), w_(scratch) {
    // Columns past the last dimension stay 0.
    std::fill_n(w_.q, shape_.tile_q * w_.q_columns, 0.0f);
    std::fill_n(w_.d_out, shape_.tile_q * w_.d_out_columns, 0.0f);
  }

  // Answers the keys that some row of the tile sees.
  KeyRange enter(const BackwardHead& head, int64_t q_tile) {
    head_ = head;
    q_tile_ = q_tile;
    begin_ = q_tile * shape_.tile_q;
    count_ = std::min(shape_.tile_q, head.rows() - begin_);
    first_row_ = shape_.first_row(head) + begin_;
    return keys_of_rows(p_, head, begin_, begin_ + count_);
  }

  void load() {
    load_ranges();
    load_rows();
  }

  // Rows are numbered from 0 within the tile.
  int64_t count() const { return count_; }
  int64_t padded_count() const { return round_up(count_, kBackwardRowStep); }
  int64_t query_of(int64_t r) const { return head_.query_of(begin_ + r); }
  int64_t head_of(int64_t r) const { return head_.head_of(begin_ + r); }
  const BackwardHead& head() const { return head_; }
  // Of its log-sum-exp.
  int64_t index(int64_t r) const {
    return row_index(p_.query_layout, p_.heads_q, p_.len_q, head_.sequence.query_batch, head_of(r),
                     head_.token_of(begin_ + r));
  }

  float* q(int64_t r) const { return w_.q + r * w_.q_columns; }
  float* d_out(int64_t r) const { return w_.d_out + r * w_.d_out_columns; }
  ptrdiff_t q_stride() const { return w_.q_columns; }
  ptrdiff_t d_out_stride() const { return w_.d_out_columns; }
  bool is_finite() const { return is_finite_; }

  float& shift(int64_t r) const { return shared_.shift[shared_row(r)]; }
  float& factor(int64_t r) const { return shared_.factor[shared_row(r)]; }
  float& delta(int64_t r) const { return shared_.delta[shared_row(r)]; }
  int32_t& turn() const { return shared_.turns[shape_.first_tile(head_) + q_tile_]; }
  float* dq(int64_t r) const { return shared_.dq + shared_row(r) * shared_.dq_columns; }

  // Apart from an array mask.
  int32_t first_key(int64_t r) const { return w_.first[r]; }
  int32_t end_key(int64_t r) const { return w_.last[r]; }
  bool sees(int64_t r, int64_t key) const {
    return w_.first[r] <= key && key < w_.last[r] &&
           mask_bias(p_, t_.mask, head_.sequence.batch_idx, head_of(r), query_of(r), key) !=
               kMinusInfinity;
  }

  // Widens a row of q, out or d_out. Answers whether it is finite.
  bool widen(int64_t r, const void* data, const Strides& stride, int64_t dim, float* to) const {
    return widen_row(data, p_.dtype_q, head_.row_offset(stride, begin_ + r), stride[3], dim, to);
  }

  void store_dq(int64_t r, const float* dq) const {
    store_scaled(dq, p_.scale, p_.dim_qk, t_.dq, p_.dtype_q,
                 head_.row_offset(p_.stride_dq, begin_ + r), p_.stride_dq[3]);
  }

 private:
  static constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

  int64_t shared_row(int64_t r) const { return first_row_ + r; }

  // Each row's visible keys; rows past the last one and rows without a weight see nothing. One
  // store an element: see prefill/worker-inl.h.
  void load_ranges() {
    for (int64_t r = 0; r < padded_count(); ++r) {
      const bool is_empty = r >= count_ || shift(r) == kMinusInfinity;
      const KeyRange visible =
          is_empty ? KeyRange{0, 0} : visible_keys(p_, head_.sequence, query_of(r));
      const int64_t end = std::max<int64_t>(visible.end, 0);
      w_.first[r] = static_cast<int32_t>(std::min(visible.begin, end));
      w_.last[r] = static_cast<int32_t>(end);
    }
  }

  void load_rows() {
    const float scale = scale_to_base_2(p_);
    is_finite_ = true;
    for (int64_t r = 0; r < padded_count(); ++r) {
      if (r >= count_) {
        std::fill_n(q(r), p_.dim_qk, 0.0f);
        std::fill_n(d_out(r), p_.dim_v, 0.0f);
        continue;
      }
      is_finite_ &= widen(r, t_.q, p_.stride_q, p_.dim_qk, q(r));
      is_finite_ &= widen(r, t_.d_out, p_.stride_d_out, p_.dim_v, d_out(r));
      for (int64_t d = 0; d < p_.dim_qk; ++d) q(r)[d] *= scale;
    }
  }

  const Problem& p_;
  const Tensors& t_;
  const BackwardWorkspace& shared_;
  const BackwardShape& shape_;
  const BackwardScratch& w_;
  BackwardHead head_;
  int64_t q_tile_ = 0, begin_ = 0, count_ = 0, first_row_ = 0;
  bool is_finite_ = true;
};

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
