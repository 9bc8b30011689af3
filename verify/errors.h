// How far numbers are from those that were expected.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/problem.h"

namespace wh {

// The contract's bound on the relative RMS error of out, docs/semantics.md.
inline double tolerance_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
      return 4e-6;
    case Dtype::kF16:
      return 9e-4;
    case Dtype::kBf16:
      return 7e-3;
  }
  return 0;
}
// And of the log-sum-exp, which is f32 whatever out is.
constexpr double kLogSumExpTolerance = 1e-6;

class Errors {
 public:
  void add(double have, double wanted) {
    // The log-sum-exp of a row that sees no key, or a NaN that a row sees.
    if (have == wanted || (std::isnan(have) && std::isnan(wanted))) {
      if (std::isfinite(wanted)) squares_ += wanted * wanted;
      return;
    }
    const double error = std::fabs(have - wanted);
    error_squares_ += error * error;
    squares_ += wanted * wanted;
    if (!(error <= largest_)) largest_ = error;  // NaN is larger than any
  }

  // RMS of the errors over RMS of what was expected; infinite where that should have been 0.
  double relative_rms() const {
    return error_squares_ == 0 ? 0 : std::sqrt(error_squares_ / squares_);
  }
  double largest() const { return largest_; }

 private:
  double error_squares_ = 0, squares_ = 0, largest_ = 0;
};

}  // namespace wh
