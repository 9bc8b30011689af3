// What a row's keys weigh together: log-sum-exp in two parts.
#pragma once

namespace wh::cuda {

// The weights are 2^(score - largest). One number, the logarithm, would not do where parts of a row
// are merged: at the largest biases (2^126) it cannot tell one key from a thousand.
struct RowWeight {
  float largest;  // score in base 2; minus infinity where no key is seen
  float sum;      // of the weights; 0 where no key is seen, NaN where a score is
};

}  // namespace wh::cuda
