// What is made of a row tile before keys meet it: delta, and how scores become weights.
#if defined(WH_CPU_BACKWARD_PREPARE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WH_CPU_BACKWARD_PREPARE_INL_H_
#undef WH_CPU_BACKWARD_PREPARE_INL_H_
#else
#define WH_CPU_BACKWARD_PREPARE_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/backward/key_tile-inl.h"
#include "cpu/backward/layout.h"
#include "cpu/backward/row_tile-inl.h"
#include "cpu/backward/weights-inl.h"
#include "cpu/common/steps.h"
#include "cpu/common/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

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

class RowPreparation {
 public:
  RowPreparation(const Problem& p, const Tensors& t, const BackwardWorkspace& workspace,
                 int32_t worker_idx, Progress& progress)
      : p_(p),
        t_(t),
        shape_(workspace.shape),
        w_(workspace.scratch(worker_idx)),
        rows_(p, t, workspace, w_),
        keys_(p, t, shape_, w_),
        weights_(p, t, shape_, w_, rows_, keys_),
        steps_(progress) {}

  // False: stop.
  bool run(int64_t head_idx, int64_t q_tile) {
    const BackwardHead head = BackwardHead::at(p_, t_, head_idx);
    if (q_tile >= shape_.tiles_of(head)) return true;
    const KeyRange seen = rows_.enter(head, q_tile);
    bool is_coarse = false;
    for (int64_t r = 0; r < rows_.count(); ++r) is_coarse |= prepare(r);
    if (is_coarse) prepare_coarse_rows(head, seen);
    rows_.turn() = static_cast<int32_t>(seen.begin / shape_.tile_k);
    if (seen.empty()) {
      steps_.writing_out();
      std::fill_n(w_.staged, p_.dim_qk, 0.0f);
      for (int64_t r = 0; r < rows_.count(); ++r) rows_.store_dq(r, w_.staged);
    }
    return steps_.done(rows_.count() * p_.dim_v);
  }

 private:
  static constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
  // A log-sum-exp beyond it is too coarse: its rounding is the relative error of all weights of the
  // row, 4e-6 here. A mask of the lowest number of f32 leaves nothing of what it is added to.
  static constexpr float kCoarseLogSumExp = 64;

  // Answers whether the row's log-sum-exp is coarse.
  bool prepare(int64_t r) {
    float* d_out = w_.staged;
    float* out = w_.staged + w_.staged_columns;
    rows_.widen(r, t_.d_out, p_.stride_d_out, p_.dim_v, d_out);
    rows_.widen(r, t_.out, p_.stride_out, p_.dim_v, out);
    const int64_t head = rows_.head_of(r);
    const float lse = t_.log_sum_exp[rows_.index(r)];
    rows_.delta(r) = dot(d_out, out, p_.dim_v);
    rows_.shift(r) = lse * kLog2E;
    rows_.factor(r) = 1;
    const bool is_coarse = std::abs(lse) > kCoarseLogSumExp && lse != kMinusInfinity;
    w_.largest[r] = sink_score(p_.has_sinks ? t_.sinks : nullptr, head) * kLog2E;
    w_.sums[r] = is_coarse ? (p_.has_sinks ? 1.0f : 0.0f) : -1.0f;
    return is_coarse;
  }

  // The softmax of these rows once more, from the very scores that the items will see: the largest
  // one's weight is then right whatever its size.
  void prepare_coarse_rows(const BackwardHead& head, KeyRange seen) {
    rows_.load();
    for (int64_t k_tile = seen.begin / shape_.tile_k; k_tile * shape_.tile_k < seen.end; ++k_tile) {
      keys_.load(head, k_tile);
      for (int64_t panel = 0; panel < keys_.panels(); ++panel) {
        with_vectors(keys_.vectors(panel),
                     [&](auto vectors) HWY_ATTR { add_to_coarse_rows<vectors()>(panel); });
      }
    }
    for (int64_t r = 0; r < rows_.count(); ++r) {
      if (w_.sums[r] < 0) continue;
      rows_.shift(r) = w_.largest[r];
      rows_.factor(r) = 1 / w_.sums[r];
    }
  }

  template <int kVectors>
  void add_to_coarse_rows(int64_t panel) {
    const F32 f32;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(f32));
    weights_.score<kVectors>(panel);
    for (int64_t r = 0; r < rows_.count(); ++r) {
      if (w_.sums[r] < 0) continue;
      for (int c = 0; c < kVectors; ++c) {
        const auto raw = hn::Load(f32, weights_.values() + (r * kVectors + c) * lanes);
        const auto scores =
            hn::IfThenElse(weights_.visible(panel, r, c), raw, hn::Set(f32, kMinusInfinity));
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

  const Problem& p_;
  const Tensors& t_;
  const BackwardShape& shape_;
  const BackwardScratch w_;
  RowTile rows_;
  KeyTile keys_;
  Weights weights_;
  Steps steps_;
};

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
