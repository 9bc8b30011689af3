// What a worker does with an item of keys: dk and dv, and its part of dq. See kernel.cpp.
#if defined(WH_CPU_BACKWARD_WORKER_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WH_CPU_BACKWARD_WORKER_INL_H_
#undef WH_CPU_BACKWARD_WORKER_INL_H_
#else
#define WH_CPU_BACKWARD_WORKER_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "cpu/backward/key_tile-inl.h"
#include "cpu/backward/layout.h"
#include "cpu/backward/products-inl.h"
#include "cpu/backward/row_tile-inl.h"
#include "cpu/backward/special-inl.h"
#include "cpu/backward/weights-inl.h"
#include "cpu/common/steps.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

class BackwardWorker {
 public:
  BackwardWorker(const Problem& p, const Tensors& t, const BackwardWorkspace& workspace,
                 int32_t worker_idx, Progress& progress)
      : p_(p),
        t_(t),
        shape_(workspace.shape),
        dq_stride_(workspace.dq_columns),
        w_(workspace.scratch(worker_idx)),
        rows_(p, t, workspace, w_),
        keys_(p, t, shape_, w_),
        weights_(p, t, shape_, w_, rows_, keys_),
        special_(p, t, w_, rows_, keys_, weights_),
        progress_(progress),
        steps_(progress) {
    std::fill_n(w_.ones, shape_.lanes, 1.0f);
  }

  // False: the caller wants to stop.
  bool run(int64_t head_idx, int64_t k_tile) {
    const BackwardHead head = BackwardHead::at(p_, t_, head_idx);
    if (k_tile * shape_.tile_k >= head.keys) return true;
    k_tile_ = k_tile;
    keys_.load(head, k_tile);
    keys_.clear_gradients();
    // Last rows first: with causal every tile of keys meets them, so that the items of a head,
    // which add to dq in turn, follow each other at once.
    for (int64_t q_tile = shape_.tiles_of(head) - 1; q_tile >= 0; --q_tile) {
      if (!run_rows(q_tile)) return false;
    }
    if (!steps_.look()) return false;
    steps_.writing_out();
    keys_.store_gradients();
    return steps_.done(keys_.range().size() * (p_.dim_qk + p_.dim_v));
  }

 private:
  bool run_rows(int64_t q_tile) {
    const KeyRange tile = keys_.range();
    const KeyRange seen = rows_.enter(keys_.head(), q_tile);
    const KeyRange keys{std::max(seen.begin, tile.begin), std::min(seen.end, tile.end)};
    if (keys.empty()) return true;
    rows_.load();
    const int64_t begin = (keys.begin - tile.begin) / shape_.lanes;
    const int64_t end = divide_up(keys.end - tile.begin, shape_.lanes);
    for (int64_t panel = begin; panel < end; ++panel) {
      with_vectors(keys_.vectors(panel),
                   [&](auto vectors) HWY_ATTR { run_panel<vectors()>(panel); });
    }
    if (!await_turn()) return false;
    const bool is_first = seen.begin >= tile.begin;
    if (is_first) std::fill_n(rows_.dq(0), rows_.padded_count() * dq_stride_, 0.0f);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t width = keys_.width(panel);
      add_to_queries({weights_.gradients(panel), width}, {keys_.rows(panel), keys_.row_stride()},
                     width, {rows_.dq(0), dq_stride_}, rows_.padded_count(),
                     round_up(p_.dim_qk, static_cast<int64_t>(hn::Lanes(F32()))));
    }
    if (!keys_.is_finite()) {
      for (int64_t panel = begin; panel < end; ++panel) special_.add_keys(panel);
    }
    if (seen.end <= tile.end) {
      steps_.writing_out();
      for (int64_t r = 0; r < rows_.count(); ++r) rows_.store_dq(r, rows_.dq(r));
    }
    std::atomic_ref<int32_t>(rows_.turn())
        .store(static_cast<int32_t>(k_tile_ + 1), std::memory_order_release);
    return steps_.done(backward_work(p_, rows_.count(), keys.size()));
  }

  template <int kVectors>
  void run_panel(int64_t panel) {
    const int64_t width = kVectors * static_cast<int64_t>(hn::Lanes(F32()));
    weights_.weigh<kVectors>(panel);
    const bool has_special = !rows_.is_finite();
    if (has_special) special_.clear_rows();
    for (int64_t d = 0; d < p_.dim_v; d += kTileRows) {
      value_tile<kVectors>(weights_.values(), rows_.d_out(0) + d, rows_.d_out_stride(),
                           rows_.padded_count(), w_.ones, keys_.dv(panel) + d * width);
    }
    for (int64_t d = 0; d < p_.dim_qk; d += kTileRows) {
      value_tile<kVectors>(weights_.gradients(panel), rows_.q(0) + d, rows_.q_stride(),
                           rows_.padded_count(), w_.ones, keys_.dk(panel) + d * width);
    }
    if (!has_special) return;
    rows_.load();
    special_.add_rows(panel);
  }

  // The items of a head add to a row tile's dq in the order of their keys, whatever threads they
  // run on. An item waits only for those before it, which workers have taken before: one of them
  // always goes on.
  bool await_turn() const {
    // Looks at a thread that runs, before others get the core, and before they get it for a while.
    constexpr int kLooks = 1000, kYields = 200;
    const std::atomic_ref<int32_t> turn(rows_.turn());
    for (int looks = 0; turn.load(std::memory_order_acquire) != k_tile_; ++looks) {
      if (progress_.is_cancelled()) return false;
      if (looks > kLooks + kYields) std::this_thread::sleep_for(std::chrono::microseconds(50));
      if (looks > kLooks) std::this_thread::yield();
    }
    return true;
  }

  const Problem& p_;
  const Tensors& t_;
  const BackwardShape& shape_;
  const ptrdiff_t dq_stride_;
  const BackwardScratch w_;
  RowTile rows_;
  KeyTile keys_;
  Weights weights_;
  SpecialValues special_;
  const Progress& progress_;
  Steps steps_;
  int64_t k_tile_ = 0;
};

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
