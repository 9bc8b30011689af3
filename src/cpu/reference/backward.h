// Gradients in float64, straight from the definition: the oracle of every backward kernel. It works
// out and log-sum-exp out itself and reads neither.
#pragma once

#include <cstddef>

#include "core/problem.h"
#include "core/progress.h"

namespace wh::cpu {

enum class Sums : uint8_t {
  kGradients,
  // The roots of the sums of the squares of what is summed: errors of rounding, which are
  // independent, are a share of these, whatever cancels in the sums.
  kRoundings,
};

size_t reference_backward_bytes(const Problem& problem);  // of scratch

// dk and dv of one kv head, dq and d_sinks of its group, in every batch entry. False: stopped.
bool reference_backward(const Problem& problem, const Tensors& tensors, int64_t head_kv, Sums sums,
                        void* scratch, Progress& progress);

}  // namespace wh::cpu
