// Gradients of an input: what a backward kernel should answer, and how far it is from that.
#pragma once

#include <string>
#include <vector>

#include "verify/host_tensors.h"

namespace wh {

// What the backward pass reads beside the forward pass's tensors, and what it writes. `problem`
// is of the backward pass; its gradients lie as q, k and v do, or densely where those share
// memory, and d_out as out does, by length first, or as one number for all.
class GradientTensors {
 public:
  // Fills out and log-sum-exp by the float64 reference.
  explicit GradientTensors(const Input& input);

  const Problem& problem() const { return problem_; }
  Tensors tensors();           // without a workspace
  void poison_outputs();       // before every run
  std::string damage() const;  // what was written where it must not be; empty: nothing
  // The bytes of all gradients.
  std::vector<std::byte> answer() const;

 private:
  friend class ExpectedGradients;

  Problem problem_;
  HostTensors inputs_;
  GuardedTensor d_out_, dq_, dk_, dv_, d_sinks_;
  uint64_t fingerprint_ = 0;  // of what the run reads, but for `inputs_`
};

struct GradientDifference {
  double worst_share = 0;  // of the tolerance
  std::string message;     // empty: within tolerance everywhere
};

// In float64 arithmetic, rounded to f32 at the very end.
//
// An error is measured against the root of the sum of the squares of what is summed and of the
// sum, as sums may cancel to nothing: a row that sees one key has dq 0. Of that, rounding the
// result leaves as much as out's tolerance allows (4e-6, 9e-4 and 7e-3 for f32, f16 and bf16), and
// rounding out, from which kernels get the sum of weights times their gradients, as much again,
// twice: it is one error for a whole row, and few rows are no mean. Elementwise 8 times as much.
class ExpectedGradients {
 public:
  explicit ExpectedGradients(const GradientTensors& data);

  GradientDifference compare(const GradientTensors& data) const;

 private:
  // Dense f32 tensors.
  struct Answer {
    std::vector<float> dq, dk, dv, d_sinks;
  };
  Answer gradients_, roundings_;
};

}  // namespace wh
