// Rows whose keys were split between blocks: what each split leaves behind, and the kernel that
// merges it by log-sum-exp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/common/row_weight.h"

namespace wh::cuda {

// More than one wave of the largest card's multiprocessors would only cost traffic.
constexpr int32_t kMostSplits = 160;

// Attention kernels write out in q's type, the merge behind them in any.
inline int64_t least_splits(const Problem& problem) {
  return problem.dtype_out() == problem.dtype_q ? 1 : 2;
}
constexpr const char* kWritesTypeOfQ =
    "writes out in q's type; with f32 out a kernel must split the keys and merge";

// Rows are numbered as in log_sum_exp (row_index() of core/sequence.h). A split
// that saw no key of a row leaves a weight of 0 and anything in `sums`, but writes them: a merge
// that waited for the weights before it asked for sums would take one more trip to L2, 0.2 us of 7.
struct Partials {
  float* sums = nullptr;         // [splits, rows, columns]: normalised weights times V, all written
  RowWeight* weights = nullptr;  // [rows, splits]; a merge reads a row of them at once
  int64_t rows = 0;
  int32_t splits = 1;
  int32_t columns = 0;  // dim_v in whole float4

  // Lays the arrays out from `base` on. One split leaves nothing.
  static Partials at(void* base, const Problem& problem, int32_t splits);
  static size_t bytes(const Problem& problem, int32_t splits);
};

// Merges in the order of the splits, so that the same splits give the same bits, adds the sinks,
// and writes out and log_sum_exp. Starts while the kernel in front still runs (programmatic
// dependent launch) and waits for it.
Status launch_combine(const AttentionArgs& args, Dtype dtype, const Partials& partials,
                      cudaStream_t stream);

}  // namespace wh::cuda
