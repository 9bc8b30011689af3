// Rows of an answer beside the float64 reference's, for problems that are too large to compare
// whole.
#pragma once

#include <cstdint>
#include <vector>

#include "input/tensors.h"

namespace wh::cli {

struct SampledRows {
  int64_t count = 0;              // of rows
  std::vector<float> have, want;  // [count, dim_v]
};

// At most 64 rows, and as many as the reference takes about 0.3 s for, but at least one.
SampledRows sample_rows(const Problem& problem, const HostTensors& tensors);

}  // namespace wh::cli
