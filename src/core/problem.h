// One attention problem as plain data: what the planner decides on and what every kernel reads.
//
//   out = softmax(mask(softcap(scale * q k^T))) v
//
// docs/semantics.md states the rules and where they are implemented.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "core/status.h"

namespace wh {

enum class Dtype : uint8_t { kF32, kF16, kBf16 };
enum class Device : uint8_t { kCpu, kCuda };
enum class Causal : uint8_t { kNone, kBottomRight, kTopLeft };
enum class MaskKind : uint8_t { kNone, kBoolean, kAdditiveF32, kAdditiveQ };
enum class Pass : uint8_t { kForward, kBackward };
// Packed: the tokens of all sequences one after another, from offsets on.
enum class QueryLayout : uint8_t { kDense, kPacked };
// Paged: keys in pages of a pool, which a table lists for each sequence.
enum class KeyLayout : uint8_t { kDense, kPacked, kPaged };
// How K or V are stored: as elements of dtype_kv, or in a format of core/quantised.h.
enum class Quantised : uint8_t { kNone, kE4m3, kInt8, kQ8_0, kQ4_0 };
// What shares an f32 scale, which a code is multiplied by: nothing has one, the whole tensor, each
// kv head of a batch entry, each key of it, each of its columns.
enum class Scales : uint8_t { kNone, kTensor, kHead, kTokenHead, kChannel };

constexpr int64_t kMaxDim = 1024;
constexpr int64_t kMaxLength = (int64_t{1} << 31) - 1;  // key lengths are int32
constexpr int64_t kUnlimited = -1;                      // a window side that hides nothing

constexpr size_t dtype_bytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
      return 4;
    case Dtype::kF16:
    case Dtype::kBf16:
      return 2;
  }
  return 0;  // validate() knows no other
}

// In elements, ordered batch, heads, length, dim; the batch's is a page's where keys are paged, and
// none's where tokens are packed.
using Strides = std::array<int64_t, 4>;

struct Problem {
  Device device = Device::kCpu;
  int32_t device_index = 0;
  Dtype dtype_q = Dtype::kF32;   // of q, and of out unless that is f32
  Dtype dtype_kv = Dtype::kF32;  // of k and v, where they are not quantised
  int64_t batch = 1;
  int64_t heads_q = 1;
  int64_t heads_kv = 1;
  int64_t len_q = 0;  // where sequences have lengths of their own, the most of one
  int64_t len_k = 0;
  int64_t dim_qk = 0;
  int64_t dim_v = 0;
  Strides stride_q{};     // of q    [batch, heads_q, len_q, dim_qk]
  Strides stride_k{};     // of k    [batch, heads_kv, len_k, dim_qk]
  Strides stride_v{};     // of v    [batch, heads_kv, len_k, dim_v]
  Strides stride_out{};   // of out  [batch, heads_q, len_q, dim_v]
  Strides stride_mask{};  // of mask [batch, heads_q, len_q, len_k]; 0 broadcasts
  float scale = 0;
  float softcap = 0;  // 0: none
  Causal causal = Causal::kNone;
  int64_t window_left = kUnlimited;
  int64_t window_right = kUnlimited;
  MaskKind mask = MaskKind::kNone;
  bool has_sinks = false;
  bool has_key_lengths = false;
  bool has_key_starts = false;
  bool wants_log_sum_exp = false;
  bool values_in_keys = false;  // v is the first dim_v columns of k: absorbed latent attention
  bool f32_out = false;         // whatever q is: for parts that are merged
  Pass pass = Pass::kForward;
  // Of the backward pass; zeros in the forward pass.
  Strides stride_d_out{};  // of d_out, of out's extents and type; 0 broadcasts
  Strides stride_dq{};     // of dq, of q's extents and type
  Strides stride_dk{};     // of dk, of k's
  Strides stride_dv{};     // of dv, of v's; as v lies in k there is no dv, and dk has its part too
  // Of packed and paged tensors (core/sequence.h); zeros in dense ones. All are the most that a run
  // may have.
  int64_t total_q = 0;            // tokens of packed queries
  int64_t total_k = 0;            // tokens of packed keys
  int64_t page_size = 0;          // keys of a page
  int64_t pages = 0;              // of the pool
  int64_t page_entries = 0;       // of the page table, where page_offsets cut it into sequences
  int64_t stride_page_table = 0;  // else from one sequence's row of it to the next's
  QueryLayout query_layout = QueryLayout::kDense;
  KeyLayout key_layout = KeyLayout::kDense;
  bool has_page_offsets = false;

  // Quantised keys and values. The answer is attention over codes times scales, rounded to f32.
  Quantised quantised_k = Quantised::kNone;
  Quantised quantised_v = Quantised::kNone;
  Scales scales_k = Scales::kNone;
  Scales scales_v = Scales::kNone;
  Strides stride_scales_k{};  // of scales_k, see scales_extents(); 0 broadcasts
  Strides stride_scales_v{};

  int64_t group() const { return heads_q / heads_kv; }
  Dtype dtype_out() const { return f32_out ? Dtype::kF32 : dtype_q; }
  bool is_dense() const {
    return query_layout == QueryLayout::kDense && key_layout == KeyLayout::kDense;
  }
  // Paged keys: the most that one sequence has.
  int64_t pages_a_sequence() const { return (len_k + page_size - 1) / page_size; }
  bool operator==(const Problem&) const = default;
};

// Pointers for one run of a plan. Unused ones are null.
struct Tensors {
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  void* out = nullptr;
  const void* mask = nullptr;
  const float* sinks = nullptr;          // [heads_q]
  const int32_t* key_lengths = nullptr;  // [batch], each 0..len_k
  const int32_t* key_starts = nullptr;   // [batch], each >= 0
  float* log_sum_exp = nullptr;  // [batch, heads_q, len_q] or [total_q, heads_q], contiguous
  // Of the backward pass, which reads out and log_sum_exp.
  const void* d_out = nullptr;
  void* dq = nullptr;
  void* dk = nullptr;
  void* dv = nullptr;
  float* d_sinks = nullptr;                // [heads_q]
  const int32_t* query_offsets = nullptr;  // [batch + 1], ascending from 0
  const int32_t* key_offsets = nullptr;    // the same of packed keys
  const int32_t* page_table = nullptr;     // a row of pages for each sequence
  const int32_t* page_offsets = nullptr;   // [batch + 1]: where each one's begin, instead of rows
  int64_t batch = 0;                       // sequences of this run; 0: as many as planned
  int64_t total_q = 0;                     // tokens that q and out have; 0: as many as planned
  const float* scales_k = nullptr;
  const float* scales_v = nullptr;
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
};

// Strides of a dense row-major tensor of these extents. A product beyond 64 bits saturates:
// validate() refuses it where it would be stepped by, and an empty tensor does not care.
Strides dense_strides(int64_t heads, int64_t length, int64_t dim);
// The same of tokens one after another, [.., length, heads, dim], as packed ones and pages have it.
Strides token_strides(int64_t heads, int64_t length, int64_t dim);
// Of scales side by side, for a tensor of so many columns.
Strides dense_scales_strides(const Problem& problem, Scales scales, int64_t columns);
// Sets the strides of q, k, v, their scales and out, where v may lie in k, those of packed tensors
// and of pages token by token, the page table's, and the usual scale, 1 / sqrt(dim_qk).
void set_dense(Problem& problem);

int64_t mask_element_bytes(const Problem& problem);  // 0 without a mask

// From each tensor's first byte to its last, what the strides leave out included. 0: empty, or the
// problem does not use it.
struct TensorBytes {
  int64_t q = 0, k = 0, v = 0, out = 0, mask = 0, sinks = 0, key_lengths = 0, key_starts = 0,
          log_sum_exp = 0, d_out = 0, dq = 0, dk = 0, dv = 0, d_sinks = 0, query_offsets = 0,
          key_offsets = 0, page_table = 0, page_offsets = 0, scales_k = 0, scales_v = 0;
};
// The problem must be one that validate() accepts.
TensorBytes tensor_bytes(const Problem& problem);

// The same problem with what makes no difference at one value, so that nobody else need know of it:
// a stride of a dimension of 1, which is never stepped over and may be anything, becomes that of
// rows side by side; those of a mask that is not there 0.
Problem canonical(Problem problem);

// Answers with the first thing wrong, naming the field, its value and what would be valid.
Status validate(const Problem& problem);
Status validate(const Problem& problem, const Tensors& tensors);
// Lengths, offsets and tables, which lie where the device has them: of a problem of the host.
Status validate_sequences(const Problem& problem, const Tensors& tensors);

// What the tensors make of a plan's problem: fewer sequences or tokens, but never more.
Result<Problem> problem_of_run(const Problem& planned, const Tensors& tensors);

// The tensors of q and out, and of K and V, as they are stored: [batch, heads, length, dim], a
// batch of one where tokens are packed, and one of pages.
struct Storage {
  int64_t batch, length;
};
Storage query_storage(const Problem& problem);
Storage key_storage(const Problem& problem);

// [batch, heads_kv, keys, columns] of scales of K or V with so many columns: 1 where they share
// one, 0 where there are none.
std::array<int64_t, 4> scales_extents(const Problem& problem, Scales scales, int64_t columns);
constexpr bool is_quantised(const Problem& p) {
  return p.quantised_k != Quantised::kNone || p.quantised_v != Quantised::kNone;
}

// Whether a run has anything to do.
bool writes_anything(const Problem& problem);

// "8/2 heads, dim 256, 512 x 4096, f16, causal": for messages and plans.
std::string describe(const Problem& problem);

}  // namespace wh
