// Partial results of rows whose keys are split into chunks, and their merge by log-sum-exp.
//
// A chunk leaves for each row its largest score m (base 2), its sum l of 2^(s - m) and its
// unnormalised output o. Merging runs over chunks in order, so the bits do not depend on which
// thread finished first.
#pragma once

#include <cstdint>

#include "core/carver.h"
#include "core/output_merge.h"
#include "core/problem.h"
#include "core/sequence.h"

namespace wh::cpu {

// Rows are numbered within a (sequence, kv head) pair: row = query_idx * group + head in the group.
struct RowId {
  Sequence sequence;
  int64_t head_kv, row;
};

struct Partials {
  int64_t chunks = 0;
  int64_t rows = 0;  // of the whole problem, each sequence with the most queries
  int64_t dim_v = 0;
  float* m = nullptr;  // [chunks, rows]
  float* l = nullptr;  // [chunks, rows]
  float* o = nullptr;  // [chunks, rows, dim_v]

  void carve(Carver& carver) {
    m = carver.take<float>(chunks * rows);
    l = carver.take<float>(chunks * rows);
    o = carver.take<float>(chunks * rows * dim_v);
  }
};

// Writes one finished row: out = o / l, log-sum-exp from m and l, with the sink joined in. A
// row that saw no key becomes 0 and minus infinity.
void store_row(const Problem& problem, const Tensors& tensors, RowId id, float m, float l,
               const float* o);

// Merges the chunks of rows [begin, end) and stores those that their sequences have. scratch:
// [dim_v].
void merge_rows(const Problem& problem, const Tensors& tensors, const Partials& partials,
                int64_t begin, int64_t end, float* scratch);

// Merges rows [begin, end), numbered as in a contiguous log-sum-exp, in the order of the parts. A
// row is read before it is written, so out may be a part's.
void merge_outputs(const OutputMerge& merge, int64_t begin, int64_t end);

}  // namespace wh::cpu
