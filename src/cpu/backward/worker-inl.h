// What a worker does with a row tile before and with an item of keys after: see kernel.cpp.
#if defined(WH_CPU_BACKWARD_WORKER_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WH_CPU_BACKWARD_WORKER_INL_H_
#undef WH_CPU_BACKWARD_WORKER_INL_H_
#else
#define WH_CPU_BACKWARD_WORKER_INL_H_
#endif

#include <hwy/highway.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <limits>
#include <thread>

#include "core/array_mask.h"
#include "core/key_range.h"
#include "cpu/backward/layout.h"
#include "cpu/common/steps.h"
#include "cpu/common/tile-inl.h"
#include "cpu/common/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// dq[row][d] += sum_key ds[row][key] * k[key][d], of kTileRows rows and kVectors vectors of d.
struct Matrix {
  float* data;
  ptrdiff_t stride;
};
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

inline float dot(const float* a, const float* b, int64_t dim) {
  const F32 f32;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(f32));
  auto sums = hn::Zero(f32);
  int64_t d = 0;
  for (; d + lanes <= dim; d += lanes) {
    sums = hn::MulAdd(hn::LoadU(f32, a + d), hn::LoadU(f32, b + d), sums);
  }
  float sum = hn::GetLane(hn::SumOfLanes(f32, sums));
  for (; d < dim; ++d) sum += a[d] * b[d];
  return sum;
}

inline void clear_special(float* row, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) row[d] = std::isfinite(row[d]) ? row[d] : 0.0f;
}

class BackwardWorker {
 public:
  BackwardWorker(const Problem& p, const Tensors& t, const BackwardWorkspace& workspace,
                 int32_t worker_idx, Progress& progress)
      : p_(p),
        t_(t),
        shared_(workspace),
        shape_(workspace.shape),
        w_(workspace.scratch(worker_idx)),
        progress_(progress),
        steps_(progress) {
    std::fill_n(w_.ones, shape_.lanes, 1.0f);
    // Columns past the last dimension stay 0.
    std::fill_n(w_.q, shape_.tile_q * w_.q_columns, 0.0f);
    std::fill_n(w_.d_out, shape_.tile_q * w_.d_out_columns, 0.0f);
  }

  // Of each row of a tile: delta, and how its scores become weights. False: stop.
  bool prepare(int64_t head, int64_t q_tile) {
    enter_head(head);
    const KeyRange seen = enter_rows(q_tile);
    bool is_coarse = false;
    for (int64_t r = 0; r < rows_; ++r) is_coarse |= prepare_row(r);
    if (is_coarse) prepare_coarse_rows(seen);
    turn_of(q_tile) = static_cast<int32_t>(seen.begin / shape_.tile_k);
    if (seen.empty()) {
      steps_.writing_out();
      std::fill_n(w_.staged, p_.dim_qk, 0.0f);
      for (int64_t r = 0; r < rows_; ++r) store_dq(row_begin_ + r, w_.staged);
    }
    return steps_.done(rows_ * p_.dim_v);
  }

  // dk and dv of a tile of keys, and its part of dq. False: the caller wants to stop.
  bool run(int64_t head, int64_t k_tile) {
    enter_head(head);
    k_tile_ = k_tile;
    load_keys();
    // Last rows first: with causal every tile of keys meets them, so that the items of a head,
    // which add to dq in turn, follow each other at once.
    for (int64_t q_tile = shape_.q_tiles - 1; q_tile >= 0; --q_tile) {
      if (!run_rows(q_tile)) return false;
    }
    if (!steps_.look()) return false;
    steps_.writing_out();
    for (int64_t panel = 0; panel * shape_.lanes < tile_.size(); ++panel) store_keys(panel);
    return steps_.done(tile_.size() * (p_.dim_qk + p_.dim_v));
  }

 private:
  static constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
  // A log-sum-exp beyond it is too coarse: its rounding is the relative error of all weights of the
  // row, 4e-6 here. A mask of the lowest number of f32 leaves nothing of what it is added to.
  static constexpr float kCoarseLogSumExp = 64;

  static int64_t vector_lanes() { return static_cast<int64_t>(hn::Lanes(F32())); }
  static int64_t padded(int64_t dim) { return (dim + 7) / 8 * 8; }

  int64_t query_of(int64_t row) const { return row / p_.group(); }
  int64_t head_of(int64_t row) const { return head_kv_ * p_.group() + row % p_.group(); }
  int64_t shared_row(int64_t row) const { return head_ * shape_.padded_rows() + row; }
  int64_t offset_of(const Strides& stride, int64_t row) const {
    return batch_idx_ * stride[0] + head_of(row) * stride[1] + query_of(row) * stride[2];
  }
  int64_t offset_of_key(const Strides& stride, int64_t key) const {
    return batch_idx_ * stride[0] + head_kv_ * stride[1] + key * stride[2];
  }
  // The last panel of a tile takes as few vectors as hold its keys.
  int64_t panel_vectors(int64_t panel) const {
    const int64_t keys = std::min(shape_.lanes, tile_.size() - panel * shape_.lanes);
    return (keys + vector_lanes() - 1) / vector_lanes();
  }
  int64_t panels() const { return (tile_.size() + shape_.lanes - 1) / shape_.lanes; }
  float* k_panel(int64_t panel) const { return w_.k_lanes + panel * p_.dim_qk * shape_.lanes; }
  float* v_panel(int64_t panel) const { return w_.v_lanes + panel * p_.dim_v * shape_.lanes; }
  float* dk_panel(int64_t panel) const {
    return w_.dk_lanes + panel * padded(p_.dim_qk) * shape_.lanes;
  }
  float* dv_panel(int64_t panel) const {
    return w_.dv_lanes + panel * padded(p_.dim_v) * shape_.lanes;
  }
  float* ds_panel(int64_t panel) const {
    return w_.d_scores + panel * shape_.tile_q * shape_.lanes;
  }

  static bool widen(const void* data, Dtype dtype, int64_t offset, int64_t stride, int64_t dim,
                    float* to) {
    const auto* bytes = static_cast<const std::byte*>(data);
    return widen_row(bytes + offset * static_cast<int64_t>(dtype_bytes(dtype)), dtype, stride, dim,
                     to);
  }

  void enter_head(int64_t head) {
    head_ = head;
    batch_idx_ = head / p_.heads_kv;
    head_kv_ = head % p_.heads_kv;
    present_ = present_keys(p_, t_, batch_idx_);
  }

  // The keys that some row of the tile sees.
  KeyRange enter_rows(int64_t q_tile) {
    row_begin_ = q_tile * shape_.tile_q;
    rows_ = std::min(shape_.tile_q, shape_.rows_per_head - row_begin_);
    return keys_of_rows(p_, present_, row_begin_, row_begin_ + rows_);
  }

  // Answers whether the row's log-sum-exp is coarse.
  bool prepare_row(int64_t r) {
    const int64_t row = row_begin_ + r;
    float* d_out = w_.staged;
    float* out = w_.staged + w_.staged_columns;
    widen(t_.d_out, p_.dtype_q, offset_of(p_.stride_d_out, row), p_.stride_d_out[3], p_.dim_v,
          d_out);
    widen(t_.out, p_.dtype_q, offset_of(p_.stride_out, row), p_.stride_out[3], p_.dim_v, out);
    const int64_t i = shared_row(row);
    const float lse =
        t_.log_sum_exp[(batch_idx_ * p_.heads_q + head_of(row)) * p_.len_q + query_of(row)];
    shared_.delta[i] = dot(d_out, out, p_.dim_v);
    shared_.shift[i] = lse * kLog2E;
    shared_.factor[i] = 1;
    const bool is_coarse = std::abs(lse) > kCoarseLogSumExp && lse != kMinusInfinity;
    w_.largest[r] = sink_score(p_.has_sinks ? t_.sinks : nullptr, head_of(row)) * kLog2E;
    w_.sums[r] = is_coarse ? (p_.has_sinks ? 1.0f : 0.0f) : -1.0f;
    return is_coarse;
  }

  // The softmax of these rows once more, from the very scores that the items will see: the largest
  // one's weight is then right whatever its size.
  void prepare_coarse_rows(KeyRange seen) {
    load_ranges();
    load_rows();
    for (k_tile_ = seen.begin / shape_.tile_k; k_tile_ * shape_.tile_k < seen.end; ++k_tile_) {
      load_keys();
      for (int64_t panel = 0; panel < panels(); ++panel) {
        with_vectors(panel_vectors(panel),
                     [&](auto vectors) HWY_ATTR { add_to_coarse_rows<vectors()>(panel); });
      }
    }
    for (int64_t r = 0; r < rows_; ++r) {
      if (w_.sums[r] < 0) continue;
      shared_.shift[shared_row(row_begin_ + r)] = w_.largest[r];
      shared_.factor[shared_row(row_begin_ + r)] = 1 / w_.sums[r];
    }
  }

  template <int kVectors>
  void add_to_coarse_rows(int64_t panel) {
    const F32 f32;
    const int64_t lanes = vector_lanes();
    score<kVectors>(panel);
    finish_scores(panel, kVectors * lanes, /*has_gradients=*/false);
    for (int64_t r = 0; r < rows_; ++r) {
      if (w_.sums[r] < 0) continue;
      for (int c = 0; c < kVectors; ++c) {
        const auto raw = hn::Load(f32, w_.weights + (r * kVectors + c) * lanes);
        const auto scores =
            hn::IfThenElse(visible<kVectors>(panel, r, c), raw, hn::Set(f32, kMinusInfinity));
        const float largest = hn::GetLane(hn::MaxOfLanes(f32, scores));
        const float m = std::max(w_.largest[r], largest);
        if (m == kMinusInfinity) continue;
        const auto weights = exp2_nonpositive(hn::Sub(scores, hn::Set(f32, m)));
        w_.sums[r] =
            w_.sums[r] * std::exp2(w_.largest[r] - m) + hn::GetLane(hn::SumOfLanes(f32, weights));
        w_.largest[r] = m;
      }
    }
  }

  // The tile's keys and values in lanes, and keys as they lie in memory. What is not present is 0.
  void load_keys() {
    tile_ = {k_tile_ * shape_.tile_k, std::min((k_tile_ + 1) * shape_.tile_k, p_.len_k)};
    keys_are_finite_ = true;
    for (int64_t panel = 0; panel < panels(); ++panel) {
      const int64_t width = panel_vectors(panel) * vector_lanes();
      for (int64_t lane = 0; lane < width; lane += 4) {
        const int64_t key = panel * shape_.lanes + lane;
        const int64_t rows = std::min<int64_t>(4, width);
        bool is_finite = true;
        for (int64_t i = 0; i < rows; ++i) {
          is_finite &= load_key(key + i, w_.staged + i * w_.staged_columns);
        }
        float* k = w_.k + key * w_.k_columns;
        to_lanes(k, w_.k_columns, p_.dim_qk, k_panel(panel) + lane, width);
        to_lanes(w_.staged, w_.staged_columns, p_.dim_v, v_panel(panel) + lane, width);
        if (is_finite) continue;
        keys_are_finite_ = false;
        for (int64_t i = 0; i < rows; ++i) clear_special(k + i * w_.k_columns, p_.dim_qk);
      }
      std::fill_n(dk_panel(panel), padded(p_.dim_qk) * width, 0.0f);
      std::fill_n(dv_panel(panel), padded(p_.dim_v) * width, 0.0f);
    }
  }

  static void to_lanes(const float* from, ptrdiff_t from_stride, int64_t columns, float* to,
                       int64_t width) {
    if (width >= 4) return transpose_into_lanes(from, from_stride, columns, to, width);
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t i = 0; i < width; ++i) to[c * width + i] = from[i * from_stride + c];
    }
  }

  // Answers whether the key is finite; its value is in no product of a weight.
  bool load_key(int64_t slot, float* v) const {
    float* k = w_.k + slot * w_.k_columns;
    const int64_t key = tile_.begin + slot;
    std::fill_n(k + p_.dim_qk, w_.k_columns - p_.dim_qk, 0.0f);
    if (key < present_.begin || key >= present_.end) {
      std::fill_n(k, p_.dim_qk, 0.0f);
      std::fill_n(v, p_.dim_v, 0.0f);
      return true;
    }
    widen(t_.v, p_.dtype_kv, offset_of_key(p_.stride_v, key), p_.stride_v[3], p_.dim_v, v);
    return widen(t_.k, p_.dtype_kv, offset_of_key(p_.stride_k, key), p_.stride_k[3], p_.dim_qk, k);
  }

  bool run_rows(int64_t q_tile) {
    const KeyRange seen = enter_rows(q_tile);
    const KeyRange keys{std::max(seen.begin, tile_.begin), std::min(seen.end, tile_.end)};
    if (keys.empty()) return true;
    load_ranges();
    rows_are_finite_ = load_rows();
    const int64_t begin = (keys.begin - tile_.begin) / shape_.lanes;
    const int64_t end = (keys.end - tile_.begin - 1) / shape_.lanes + 1;
    for (int64_t panel = begin; panel < end; ++panel) {
      with_vectors(panel_vectors(panel),
                   [&](auto vectors) HWY_ATTR { run_panel<vectors()>(panel); });
    }
    if (!await_turn(q_tile)) return false;
    const bool is_first = seen.begin >= tile_.begin;
    if (is_first) std::fill_n(dq_row(0), shape_.tile_q * shared_.dq_columns, 0.0f);
    for (int64_t panel = begin; panel < end; ++panel) add_to_dq(panel);
    if (!keys_are_finite_) add_special_keys(begin, end);
    if (seen.end <= tile_.end) {
      steps_.writing_out();
      for (int64_t r = 0; r < rows_; ++r) store_dq(row_begin_ + r, dq_row(r));
    }
    std::atomic_ref<int32_t>(turn_of(q_tile))
        .store(static_cast<int32_t>(k_tile_ + 1), std::memory_order_release);
    return steps_.done(backward_work(p_, rows_, keys.size()));
  }

  int32_t& turn_of(int64_t q_tile) const { return shared_.turns[head_ * shape_.q_tiles + q_tile]; }

  // The items of a head add to a row tile's dq in the order of their keys, whatever threads they
  // run on. An item waits only for those before it, which workers have taken before: one of them
  // always goes on.
  bool await_turn(int64_t q_tile) const {
    // Looks at a thread that runs, before others get the core, and before they get it for a while.
    constexpr int kLooks = 1000, kYields = 200;
    const std::atomic_ref<int32_t> turn(turn_of(q_tile));
    for (int looks = 0; turn.load(std::memory_order_acquire) != k_tile_; ++looks) {
      if (progress_.is_cancelled()) return false;
      if (looks > kLooks + kYields) std::this_thread::sleep_for(std::chrono::microseconds(50));
      if (looks > kLooks) std::this_thread::yield();
    }
    return true;
  }

  float* dq_row(int64_t r) const {
    return shared_.dq + shared_row(row_begin_ + r) * shared_.dq_columns;
  }

  // Each row's visible keys; rows past the last one and rows without a weight see nothing. One
  // store an element: see prefill/worker-inl.h.
  void load_ranges() {
    for (int64_t r = 0; r < shape_.tile_q; ++r) {
      const int64_t row = row_begin_ + r;
      const bool is_empty = r >= rows_ || shared_.shift[shared_row(row)] == kMinusInfinity;
      const KeyRange visible =
          is_empty ? KeyRange{0, 0} : visible_keys(p_, present_, query_of(row));
      const int64_t end = std::max<int64_t>(visible.end, 0);
      w_.first[r] = static_cast<int32_t>(std::min(visible.begin, end));
      w_.last[r] = static_cast<int32_t>(end);
    }
  }

  bool load_rows() {
    const float scale = scale_to_base_2(p_);
    bool is_finite = true;
    for (int64_t r = 0; r < shape_.tile_q; ++r) {
      float* q = w_.q + r * w_.q_columns;
      float* d_out = w_.d_out + r * w_.d_out_columns;
      if (r >= rows_) {
        std::fill_n(q, p_.dim_qk, 0.0f);
        std::fill_n(d_out, p_.dim_v, 0.0f);
        continue;
      }
      const int64_t row = row_begin_ + r;
      is_finite &=
          widen(t_.q, p_.dtype_q, offset_of(p_.stride_q, row), p_.stride_q[3], p_.dim_qk, q);
      is_finite &= widen(t_.d_out, p_.dtype_q, offset_of(p_.stride_d_out, row), p_.stride_d_out[3],
                         p_.dim_v, d_out);
      for (int64_t d = 0; d < p_.dim_qk; ++d) q[d] *= scale;
    }
    return is_finite;
  }

  template <int kVectors>
  void run_panel(int64_t panel) {
    const int64_t width = kVectors * vector_lanes();
    float* ds = ds_panel(panel);
    score<kVectors>(panel);
    for (int64_t r = 0; r < shape_.tile_q; r += kTileRows) {
      score_tile<kVectors>(v_panel(panel), w_.d_out + r * w_.d_out_columns, w_.d_out_columns,
                           p_.dim_v, ds + r * width);
    }
    finish_scores(panel, width, /*has_gradients=*/true);
    for (int64_t r = 0; r < shape_.tile_q; ++r) weigh_row<kVectors>(panel, r);
    if (!rows_are_finite_) clear_special_rows();
    for (int64_t d = 0; d < p_.dim_v; d += kTileRows) {
      value_tile<kVectors>(w_.weights, w_.d_out + d, w_.d_out_columns, shape_.tile_q, w_.ones,
                           dv_panel(panel) + d * width);
    }
    for (int64_t d = 0; d < p_.dim_qk; d += kTileRows) {
      value_tile<kVectors>(ds, w_.q + d, w_.q_columns, shape_.tile_q, w_.ones,
                           dk_panel(panel) + d * width);
    }
    if (!rows_are_finite_) {
      load_rows();
      add_special_rows(panel, width);
    }
  }

  void load_bias(int64_t panel, int64_t width) {
    const KeyRange keys = panel_keys(panel, width);
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t row = row_begin_ + r;
      float* to = w_.bias + r * width;
      const bool is_shared = r > 0 && p_.stride_mask[1] == 0 && query_of(row) == query_of(row - 1);
      if (is_shared) {
        std::copy_n(to - width, width, to);
        continue;
      }
      load_mask_row(p_, t_.mask, batch_idx_, head_of(row), query_of(row), keys.begin, keys.size(),
                    to);
      std::fill_n(to + keys.size(), width - keys.size(), 0.0f);
    }
  }

  KeyRange panel_keys(int64_t panel, int64_t width) const {
    const int64_t begin = tile_.begin + panel * shape_.lanes;
    return {begin, std::min(begin + width, tile_.end)};
  }

  // In base 2, but for softcap and masks.
  template <int kVectors>
  void score(int64_t panel) {
    const int64_t width = kVectors * vector_lanes();
    for (int64_t r = 0; r < shape_.tile_q; r += kTileRows) {
      score_tile<kVectors>(k_panel(panel), w_.q + r * w_.q_columns, w_.q_columns, p_.dim_qk,
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
    for (int64_t r = 0; r < rows_; ++r) {
      const auto delta = hn::Set(f32, shared_.delta[shared_row(row_begin_ + r)]);
      for (int64_t i = r * width; i < (r + 1) * width; i += vector_lanes()) {
        auto score = hn::Load(f32, w_.weights + i);
        if (p_.softcap > 0) {
          const auto capped = tanh_vector(score);
          score = hn::Mul(capped, cap);
          if (has_gradients) {
            float* ds = ds_panel(panel) + i;
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

  // Lanes whose keys lie in the row's range.
  template <int kVectors>
  HWY_INLINE auto visible(int64_t panel, int64_t r, int64_t vector) const {
    const F32 f32;
    const I32 i32;
    const int64_t key = tile_.begin + panel * shape_.lanes + vector * vector_lanes();
    const auto keys = hn::Iota(i32, static_cast<int32_t>(key));
    const auto is_begun = hn::Gt(keys, hn::Set(i32, w_.first[r] - 1));
    return hn::RebindMask(f32, hn::And(is_begun, hn::Gt(hn::Set(i32, w_.last[r]), keys)));
  }

  // Scores become weights, and d_out v the gradient of the scores in front of the scale:
  // weight * (d_out v - delta), times the slope of the softcap.
  template <int kVectors>
  HWY_INLINE void weigh_row(int64_t panel, int64_t r) {
    const F32 f32;
    const int64_t lanes = vector_lanes(), width = kVectors * lanes;
    float* s = w_.weights + r * width;
    float* ds = ds_panel(panel) + r * width;
    const int64_t key = tile_.begin + panel * shape_.lanes;
    if (w_.last[r] <= key || w_.first[r] >= key + width || w_.first[r] >= w_.last[r]) {
      std::fill_n(s, width, 0.0f);
      std::fill_n(ds, width, 0.0f);
      return;
    }
    const bool is_edge = w_.first[r] > key || w_.last[r] < key + width;
    const int64_t i = shared_row(row_begin_ + r);
    const auto shift = hn::Set(f32, shared_.shift[i]);
    const auto factor = hn::Set(f32, shared_.factor[i]);
    const auto delta = hn::Set(f32, p_.softcap > 0 ? 0.0f : shared_.delta[i]);
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
        const auto is_visible = visible<kVectors>(panel, r, c);
        weight = hn::IfThenElseZero(is_visible, weight);
        gradient = hn::IfThenElseZero(is_visible, gradient);
      }
      hn::Store(weight, f32, s + c * lanes);
      hn::Store(gradient, f32, ds + c * lanes);
    }
  }

  void add_to_dq(int64_t panel) {
    const int64_t lanes = vector_lanes();
    const int64_t width = panel_vectors(panel) * lanes;
    const int64_t columns = (p_.dim_qk + lanes - 1) / lanes * lanes;
    const ptrdiff_t dq_stride = shared_.dq_columns;
    float* k = w_.k + panel * shape_.lanes * w_.k_columns;
    for (int64_t d = 0; d < columns; d += 3 * lanes) {
      for (int64_t r = 0; r < shape_.tile_q; r += kTileRows) {
        const Matrix ds{ds_panel(panel) + r * width, width};
        const Matrix keys{k + d, w_.k_columns};
        const Matrix dq{dq_row(r) + d, dq_stride};
        switch ((columns - d) / lanes) {
          case 1:
            query_tile<1>(ds, keys, width, dq);
            break;
          case 2:
            query_tile<2>(ds, keys, width, dq);
            break;
          default:
            query_tile<3>(ds, keys, width, dq);
            break;
        }
      }
    }
  }

  // The rare tile with infinities or NaN: a weight of zero would not hide them, so the products
  // read 0 there, and what sees them gets them here.
  void clear_special_rows() {
    for (int64_t r = 0; r < rows_; ++r) {
      clear_special(w_.q + r * w_.q_columns, p_.dim_qk);
      clear_special(w_.d_out + r * w_.d_out_columns, p_.dim_v);
    }
  }

  void add_special_rows(int64_t panel, int64_t width) {
    const KeyRange keys = panel_keys(panel, width);
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t lane = 0; lane < keys.size(); ++lane) {
        if (!sees(r, keys.begin + lane)) continue;
        const auto add = [&](const float* row, int64_t dim, float weight, float* to) {
          for (int64_t d = 0; d < dim; ++d) {
            if (!std::isfinite(row[d])) to[d * width + lane] += weight * row[d];
          }
        };
        const int64_t i = r * width + lane;
        add(w_.q + r * w_.q_columns, p_.dim_qk, ds_panel(panel)[i], dk_panel(panel));
        add(w_.d_out + r * w_.d_out_columns, p_.dim_v, w_.weights[i], dv_panel(panel));
      }
    }
  }

  void add_special_keys(int64_t begin, int64_t end) {
    float* k = w_.staged;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t width = panel_vectors(panel) * vector_lanes();
      const KeyRange keys = panel_keys(panel, width);
      for (int64_t key = std::max(keys.begin, present_.begin);
           key < std::min(keys.end, present_.end); ++key) {
        if (widen(t_.k, p_.dtype_kv, offset_of_key(p_.stride_k, key), p_.stride_k[3], p_.dim_qk,
                  k)) {
          continue;
        }
        for (int64_t r = 0; r < rows_; ++r) {
          if (!sees(r, key)) continue;
          const float weight = ds_panel(panel)[r * width + key - keys.begin];
          for (int64_t d = 0; d < p_.dim_qk; ++d) {
            if (!std::isfinite(k[d])) dq_row(r)[d] += weight * k[d];
          }
        }
      }
    }
  }

  bool sees(int64_t r, int64_t key) const {
    const int64_t row = row_begin_ + r;
    return w_.first[r] <= key && key < w_.last[r] &&
           mask_bias(p_, t_.mask, batch_idx_, head_of(row), query_of(row), key) != kMinusInfinity;
  }

  void store_dq(int64_t row, const float* dq) const {
    store_scaled(dq, p_.scale, p_.dim_qk, t_.dq, p_.dtype_q, offset_of(p_.stride_dq, row),
                 p_.stride_dq[3]);
  }

  void store_keys(int64_t panel) {
    const int64_t width = panel_vectors(panel) * vector_lanes();
    const KeyRange keys = panel_keys(panel, width);
    // Queries were multiplied by scale_to_base_2(): what the scale has more than that is left.
    const float scale = p_.softcap > 0 ? p_.softcap : kLn2;
    for (int64_t lane = 0; lane < keys.size(); ++lane) {
      const int64_t key = keys.begin + lane;
      float* dk = w_.staged;
      float* dv = w_.staged + w_.staged_columns;
      for (int64_t d = 0; d < p_.dim_qk; ++d) dk[d] = dk_panel(panel)[d * width + lane] * scale;
      for (int64_t d = 0; d < p_.dim_v; ++d) dv[d] = dv_panel(panel)[d * width + lane];
      if (p_.values_in_keys) {
        for (int64_t d = 0; d < p_.dim_v; ++d) dk[d] += dv[d];
      } else {
        store_scaled(dv, 1, p_.dim_v, t_.dv, p_.dtype_kv, offset_of_key(p_.stride_dv, key),
                     p_.stride_dv[3]);
      }
      store_scaled(dk, 1, p_.dim_qk, t_.dk, p_.dtype_kv, offset_of_key(p_.stride_dk, key),
                   p_.stride_dk[3]);
    }
  }

  const Problem& p_;
  const Tensors& t_;
  const BackwardWorkspace& shared_;
  const BackwardShape& shape_;
  const BackwardScratch w_;
  const Progress& progress_;
  Steps steps_;
  int64_t head_ = 0, batch_idx_ = 0, head_kv_ = 0;
  KeyRange present_{};
  int64_t k_tile_ = 0;
  KeyRange tile_{};
  bool keys_are_finite_ = true;
  int64_t row_begin_ = 0, rows_ = 0;
  bool rows_are_finite_ = true;
};

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
