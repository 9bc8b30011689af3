// What every attention kernel reads of a problem, as plain data that is passed by value.
#pragma once

#include <cstdint>

#include "core/key_rows.h"
#include "core/problem.h"
#include "core/sequence.h"
#include "cuda/common/divisor.h"

namespace wh::cuda {

// How a score becomes an exponent. Each is a compile-time variant, so that the plain one pays
// nothing for the others.
enum class Scores : int32_t {
  kPlain,        // the scale is folded into the exponential
  kTransformed,  // softcap, or a scale that is not positive (the largest score is then no maximum)
  kMasked,       // an array mask on top
};

//
// The order counts: two that lie beside each other at a multiple of 8 bytes are loaded together,
// into registers, and where window_left and window_right did, 64 keys of 128-wide heads spilled.
struct AttentionArgs : SequencesOf<int32_t> {
  int32_t heads_q;
  int32_t group;  // query heads of one kv head
  int32_t batch;  // sequences of this run
  // Where dense keys end, TMA has zeros: a tile that hangs over has nothing there to hide. Past the
  // end of a sequence that is packed or paged lie another's keys: -1.
  int32_t zeros_from;
  int32_t dim_qk, dim_v;
  Causal causal;
  MaskKind mask_kind;
  int32_t window_left, window_right;  // kUnlimited: hides nothing; causal is window_right 0
  float scale, softcap;
  const void* v;
  void* out;
  const void* mask;
  const float* sinks;   // [heads_q]
  float* log_sum_exp;   // [batch, heads_q, len_q] or [total_q, heads_q]
  int64_t stride_v[4];  // batch or page, heads, length, dim
  int64_t stride_out[4];
  int64_t stride_mask[4];
  PageTable page_table;
  Divisor page_size;

  constexpr QueryLayout query_layout() const {
    return query_offsets != nullptr ? QueryLayout::kPacked : QueryLayout::kDense;
  }
};

// Needs fits_int32().
AttentionArgs attention_args(const Problem& problem, const Tensors& tensors);

// Whether lengths, heads and rows are so few that sums of three never wrap: at most kMaxExtent.
constexpr int64_t kMaxExtent = int64_t{1} << 29;
bool fits_int32(const Problem& problem);

Scores scores_of(const Problem& problem);

}  // namespace wh::cuda
