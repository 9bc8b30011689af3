// cpu_reference: float64, one row at a time, straight from the definition. The oracle of every
// test and the last entry of the CPU registry; never optimised.
#pragma once

#include <cstddef>

#include "core/problem.h"

namespace wh::cpu {

// Scores of one row (float64), one row of sums.
size_t reference_workspace_bytes(const Problem& problem);

// Runs rows [begin, end) of those that core/sequence.h numbers.
void reference_rows(const Problem& problem, const Tensors& tensors, int64_t begin, int64_t end,
                    double* scratch);

}  // namespace wh::cpu
