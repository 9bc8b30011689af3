// cpu_backward: gradients of q, k, v and the sinks.
//
//   p = softmax weights    delta = sum_d d_out * out    ds = p * (d_out v^T - delta)
//   dv = p^T d_out         dq = scale * ds k            dk = scale * ds^T q
//
// Schedule: an item is a tile of keys of one (sequence, kv head) pair, whose dk and dv stay in its
// worker's scratch. It meets the rows of every head of the group tile by tile, with keys on SIMD
// lanes: scores and d_out v^T from transposed keys and values, dk^T and dv^T from rows as they lie
// in memory, dq from keys as they lie in memory. dq is summed in f32 in the workspace: the items of
// a head take turns at a row tile, in the order of their keys, so that bits do not depend on
// threads. A second walk for dq would need no turns, and 7 products in place of 5.
//
// A worker's scratch holds a key_tile and a row_tile; weights are what the two make of each other,
// products sum dq, special holds what infinities and NaN add, prepare comes before, worker is the
// walk.
//
// Roofline: 2 * (3 * dim_qk + 2 * dim_v) flops a pair at the FMA peak, 2.5 times the forward pass.
#include "cpu/backward/kernel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/backward/kernel.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep
#include <hwy/highway.h>

#include "cpu/backward/prepare-inl.h"
#include "cpu/backward/worker-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {

// Row tiles until the counter has none left.
void prepare_backward(const Launch& launch, const BackwardWorkspace& workspace, int32_t worker_idx,
                      std::atomic<int64_t>& next) {
  const BackwardShape& shape = workspace.shape;
  RowPreparation rows(launch.problem, launch.tensors, workspace, worker_idx, launch.progress);
  for (int64_t i = next++; i < shape.heads * shape.q_tiles; i = next++) {
    if (!rows.run(i / shape.q_tiles, i % shape.q_tiles)) return;
  }
}

// Items until the counter has none left.
void run_backward_worker(const Launch& launch, const BackwardWorkspace& workspace,
                         int32_t worker_idx, std::atomic<int64_t>& next) {
  const BackwardShape& shape = workspace.shape;
  BackwardWorker worker(launch.problem, launch.tensors, workspace, worker_idx, launch.progress);
  // First keys first: with causal most rows see them, and the longest work should not start last.
  // Heads vary fastest, so that few items of one head wait for each other.
  for (int64_t i = next++; i < shape.items() && !launch.progress.is_cancelled(); i = next++) {
    if (!worker.run(i % shape.heads, i / shape.heads)) return;
  }
}

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wh::cpu {
HWY_EXPORT(prepare_backward);
HWY_EXPORT(run_backward_worker);

namespace {

// A sink's weight adds to no output: only delta is left of its gradient.
void store_d_sink(const Problem& p, const Tensors& t, const BackwardWorkspace& workspace,
                  int64_t head) {
  const double sink = sink_score(t.sinks, head) * kLog2E;
  const int64_t group = p.group();
  double sum = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const BackwardHead pair = BackwardHead::at(p, t, b * p.heads_kv + head / group);
    const int64_t first = workspace.shape.first_row(pair);
    for (int64_t row = head % group; row < pair.rows(); row += group) {
      const int64_t i = first + row;
      if (workspace.shift[i] == -std::numeric_limits<float>::infinity()) continue;
      sum -=
          std::exp2(sink - double{workspace.shift[i]}) * workspace.factor[i] * workspace.delta[i];
    }
  }
  t.d_sinks[head] = static_cast<float>(sum);
}

}  // namespace

Status run_backward(const Launch& launch) {
  const Problem& p = launch.problem;
  const BackwardWorkspace workspace(p, launch.config, launch.tensors.workspace);
  Progress& progress = launch.progress;
  progress.start(workspace.work(launch.tensors), "the gradients are");
  std::atomic<int64_t> next_tile{0}, next_item{0};
  const int32_t workers = workspace.workers;
  parallel(launch.executor, workers, [&](int32_t i) {
    HWY_DYNAMIC_DISPATCH(prepare_backward)(launch, workspace, i, next_tile);
  });
  if (progress.is_cancelled()) return progress.finish();
  parallel(launch.executor, workers, [&](int32_t i) {
    HWY_DYNAMIC_DISPATCH(run_backward_worker)(launch, workspace, i, next_item);
  });
  if (p.has_sinks && !progress.is_cancelled()) {
    parallel(launch.executor, static_cast<int32_t>(p.heads_q),
             [&](int32_t head) { store_d_sink(p, launch.tensors, workspace, head); });
  }
  return progress.finish();
}

}  // namespace wh::cpu
#endif
