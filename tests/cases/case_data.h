// The tensors of a case: random data where something may be read, poison everywhere else.
#pragma once

#include <cstddef>
#include <vector>

#include "cases.h"

namespace wh {

// Elements of one tensor between two guards. Whatever no element of the tensor owns (padding of
// rows, gaps of strides, the guards) is filled with NaN bits.
class GuardedTensor {
 public:
  GuardedTensor() = default;
  explicit GuardedTensor(int64_t bytes);

  std::byte* data() { return bytes_.data() + kGuardBytes; }
  const std::byte* data() const { return bytes_.data() + kGuardBytes; }
  int64_t size() const { return size_; }
  bool guards_intact() const;
  // With the guards.
  std::byte* all() { return bytes_.data(); }
  size_t all_bytes() const { return bytes_.size(); }

  static constexpr int64_t kGuardBytes = 256;

 private:
  std::vector<std::byte> bytes_;  // aligned by being offset: see the constructor
  int64_t size_ = 0;
};

struct CaseData {
  explicit CaseData(const Case& c);

  Tensors tensors();           // of this data, without a workspace
  void poison_outputs();       // before every run
  std::string damage() const;  // which tensor was written where it must not be; empty: none

  Problem problem;
  GuardedTensor q, k, v, out, mask, sinks, key_lengths, key_starts, log_sum_exp;
  std::vector<uint8_t> out_owned;  // whether each byte of `out` belongs to an element
};

// What a kernel should answer, in float64 arithmetic, rounded to f32 at the very end.
struct Expected {
  std::vector<float> out;          // [batch, heads_q, len_q, dim_v]
  std::vector<float> log_sum_exp;  // [batch, heads_q, len_q]
};

Expected expected_answer(const CaseData& data);

struct Difference {
  double relative_rms = 0;
  double tolerance = 0;  // of relative_rms
  double worst = 0;      // the largest elementwise error over its bound; 1 is the limit
  std::string message;   // empty: within tolerance everywhere
};

// Compares `data`'s outputs with what was expected.
//
// Bounds, with u the unit roundoff of the output type (2^-24, 2^-11, 2^-8): rounding the output
// leaves a relative RMS of at most u / sqrt(3); a kernel that rounds the weights to that type
// before they multiply V adds as much again with independent signs, and the f32 sums of up to 2^15
// terms stay below 30 u_f32 in RMS. The contract allows 4e-6, 9e-4 and 7e-3, which is 1.8 u for the
// 16-bit types. Elementwise, as the weights sum to 1, an error is at most that of the weights times
// the largest |v|: 6 standard deviations of the RMS bound.
Difference compare(const CaseData& data, const Expected& expected);

}  // namespace wh
