// What a kernel should answer to a case, and how far it is from that.
#pragma once

#include <string>
#include <vector>

#include "verify/errors.h"
#include "verify/host_tensors.h"

namespace wh {

// In float64 arithmetic, rounded to f32 at the very end.
struct Expected {
  std::vector<int64_t> rows;       // numbered as core/sequence.h does
  std::vector<float> out;          // [rows, dim_v]
  std::vector<float> log_sum_exp;  // [rows]
};

// All rows, or `most_rows` of them: the last and the first, the first and the last query of a
// tile of every size, and random ones. 0: all.
Expected expected_answer(const Problem& problem, const Tensors& tensors, int64_t most_rows = 0);
// These rows.
Expected expected_rows(const Problem& problem, const Tensors& tensors, std::vector<int64_t> rows);

// So many of the pairs * length rows of a tensor, or all: those named above.
std::vector<int64_t> sampled_rows(int64_t pairs, int64_t length, int64_t most_rows);

// As many rows as the reference takes about 0.3 s for on one core, but at least 1 and at most 64.
int64_t affordable_rows(const Problem& problem);
// The same of rows that take so many multiply-adds each.
int64_t affordable_rows(double multiply_adds);

// Some rows of the tensors' out as floats, or all of them, in order.
std::vector<float> rows_of_out(const Problem& problem, const Tensors& tensors,
                               const std::vector<int64_t>& rows);
std::vector<float> all_of_out(const Problem& problem, const Tensors& tensors);

// How far the tensors' out is from what was expected.
Errors errors_of(const Problem& problem, const Tensors& tensors, const Expected& expected);

struct Difference {
  double relative_rms = 0;  // 0 where too few elements were compared to judge by it
  double tolerance = 0;     // of relative_rms
  double worst = 0;         // the largest elementwise error over its bound; 1 is the limit
  std::string message;      // empty: within tolerance everywhere
};

// Compares `data`'s outputs with what was expected.
//
// Bounds, with u the unit roundoff of the output type (2^-24, 2^-11, 2^-8): rounding the output
// leaves a relative RMS of at most u / sqrt(3); a kernel that rounds the weights to that type
// before they multiply V adds as much again with independent signs, and the f32 sums of up to 2^15
// terms stay below 30 u_f32 in RMS. The contract allows 4e-6, 9e-4 and 7e-3, which is 1.8 u for the
// 16-bit types. Elementwise, as the weights sum to 1, an error is at most that of the weights times
// the largest |v|: 6 standard deviations of the RMS bound.
Difference compare(const HostTensors& data, const Expected& expected);

// Compares every row of `data`'s out with that of another kernel: of what `expected` samples this
// sees the rest. Empty: no row is off by more than both kernels' rounding.
std::string disagreement(const HostTensors& data, const std::vector<std::byte>& other_out);

}  // namespace wh
