// cpu_prefill: many query rows against a kv head.
//
// Schedule: an item is up to tile_q rows of one (batch, kv head) pair (every head of the group, so
// that a widened K/V tile serves them all), optionally one chunk of the keys. For each tile of keys
// the item's panels of `lanes` rows run scores -> online softmax -> values; scores of one panel and
// tile (18 KB) never leave L1, Q and O panels stay in L2.
//
// Roofline: 2 * (dim_qk + dim_v) flops a pair at the FMA peak. Softmax costs about 12 vector
// operations a pair, so at dim 64 it is 9 % and at 256 2.5 % of the time; widening K and V 3 %.
#include "cpu/prefill/kernel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/prefill/kernel.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep
#include <hwy/highway.h>

#include "cpu/common/kv_rows-inl.h"
#include "cpu/prefill/worker-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// f32 arithmetic: queries carry the scale, K and V of a tile are widened into the scratch.
class F32Products {
 public:
  // Scores come out in base 2.
  F32Products(const Problem& p, const Tensors& t, const PrefillScratch& scratch)
      : p_(p), k_(keys_of(p, t)), v_(values_of(p, t)), w_(scratch), scale_(scale_to_base_2(p)) {}

  void load_query(const void* row, float* to) const {
    widen_row(row, p_.dtype_q, 0, p_.stride_q[3], p_.dim_qk, to);
    for (int64_t d = 0; d < p_.dim_qk; ++d) to[d] *= scale_;
  }

  bool load_tile(const Sequence& sequence, const KeyRows& key_rows, int64_t head_kv,
                 KeyRange tile) {
    k_begin_ = tile.begin;
    v_begin_ = tile.begin / 2 * 2;
    const HeadKeys here{key_rows, sequence, head_kv, tile};
    const int64_t keys = tile.size();
    widen_keys(k_, here, w_.k_columns, w_.k);
    float* v = w_.v;
    if (v_begin_ < tile.begin) {
      std::fill_n(v, w_.v_columns, 0.0f);
      v += w_.v_columns;
    }
    const bool is_finite = widen_keys(v_, here, w_.v_columns, v);
    if (!is_finite) {
      for (float* x = v; x < v + keys * w_.v_columns; ++x) *x = std::isfinite(*x) ? *x : 0.0f;
    }
    return is_finite;
  }

  template <int kVectors>
  void scores(const float* q_panel, int64_t key, int64_t keys, float* s) const {
    const int64_t width = kVectors * static_cast<int64_t>(hn::Lanes(F32()));
    const float* k = w_.k + (key - k_begin_) * w_.k_columns;
    // Whole register tiles: rows past the last key are computed from whatever lies there, and
    // ignored.
    for (int64_t j = 0; j < keys; j += kTileRows) {
      score_tile<kVectors>(q_panel, k + j * w_.k_columns, w_.k_columns, p_.dim_qk, s + j * width);
    }
  }

  template <int kVectors>
  HWY_INLINE Vec keep(Vec even, Vec odd, int64_t row, int64_t vector) const {
    const F32 f32;
    const ptrdiff_t lanes = static_cast<ptrdiff_t>(hn::Lanes(f32));
    float* p = w_.s + (row * kVectors + vector) * lanes;
    hn::Store(even, f32, p);
    hn::Store(odd, f32, p + kVectors * lanes);
    return hn::Add(even, odd);
  }

  template <int kVectors>
  void values(int64_t key, int64_t keys, float* o) const {
    const int64_t width = kVectors * static_cast<int64_t>(hn::Lanes(F32()));
    const float* v = w_.v + (key - v_begin_) * w_.v_columns;
    for (int64_t d = 0; d < p_.dim_v; d += kTileRows) {
      value_tile<kVectors>(w_.s, v + d, w_.v_columns, keys, w_.alpha, o + d * width);
    }
  }

  float weight(int64_t row, int64_t lane, int64_t width) const { return w_.s[row * width + lane]; }

 private:
  const Problem& p_;
  const KvTensor k_, v_;
  const PrefillScratch& w_;
  const float scale_;
  int64_t k_begin_ = 0, v_begin_ = 0;  // the keys of the scratch's first rows
};

void run_prefill_worker_f32(const Problem& p, const Tensors& t, const PrefillWorkspace& workspace,
                            int32_t worker_idx, std::atomic<int64_t>& next, Progress& progress) {
  run_prefill_worker<F32Products>(p, t, workspace, worker_idx, next, progress);
}

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wh::cpu {
HWY_EXPORT(run_prefill_worker_f32);

Status run_prefill_items(const Launch& launch, RunPrefillWorker run_worker) {
  const Problem& p = launch.problem;
  const Tensors& t = launch.tensors;
  const PrefillWorkspace workspace(p, launch.config, t.workspace);
  Progress& progress = launch.progress;
  progress.start(workspace.work(t));
  std::atomic<int64_t> next{0};
  parallel(launch.executor, workspace.workers,
           [&](int32_t i) { run_worker(p, t, workspace, i, next, progress); });
  if (workspace.partials.chunks == 1 || progress.is_cancelled()) return progress.finish();
  std::atomic<int64_t> next_row{0};
  parallel(launch.executor, workspace.workers, [&](int32_t i) {
    Steps steps(progress);
    float* row_scratch = workspace.scratch(i).staged;
    for (int64_t row = next_row.fetch_add(kRowsPerMerge);
         row < workspace.partials.rows && !progress.is_cancelled();
         row = next_row.fetch_add(kRowsPerMerge)) {
      const int64_t end = std::min(row + kRowsPerMerge, workspace.partials.rows);
      steps.writing_out();
      merge_rows(p, t, workspace.partials, row, end, row_scratch);
      steps.done(merge_work(workspace.partials, end - row));
    }
  });
  return progress.finish();
}

Status run_prefill(const Launch& launch) {
  return run_prefill_items(launch, HWY_DYNAMIC_DISPATCH(run_prefill_worker_f32));
}

}  // namespace wh::cpu
#endif
