// Gradients of an input: what a backward kernel should answer, and how far it is from that.
#pragma once

#include <string>
#include <vector>

#include "verify/host_tensors.h"

namespace wh {

// What the backward pass reads beside the forward pass's tensors, and what it writes. `problem`
// is of the backward pass; its gradients lie as q, k and v do, or densely where those share
// memory, and d_out as out does or, of a hostile input, by length first or as one number for all.
// Pages of the input are packed: they have no gradients.
class GradientTensors {
 public:
  // Fills out and log-sum-exp by the float64 reference.
  explicit GradientTensors(const Input& input);
  // By a run of the forward pass on the input's device: the reference takes minutes on long ones.
  static Result<GradientTensors> after_a_run(const Input& input);

  const Problem& problem() const { return problem_; }
  Tensors tensors() const;     // without a workspace
  int64_t bytes() const;       // of all of them
  void poison_outputs();       // before every run
  std::string damage() const;  // what was written where it must not be; empty: nothing
  // The bytes of all gradients.
  std::vector<std::byte> answer() const;

 private:
  friend class ExpectedGradients;
  struct Unfilled {};
  GradientTensors(const Input& input, Unfilled);
  void note_inputs();

  Problem problem_;
  HostTensors inputs_;
  GuardedTensor d_out_, dq_, dk_, dv_, d_sinks_;
  uint64_t fingerprint_ = 0;  // of what the run reads, but for `inputs_`
};

struct GradientDifference {
  // Of the gradient whose relative RMS error is the largest share of its tolerance.
  double worst_share = 0, relative_rms = 0, tolerance = 0;
  double largest = 0;   // error of an element
  std::string message;  // empty: within tolerance everywhere
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
  // All of them, from q, k, v and d_out alone.
  explicit ExpectedGradients(const GradientTensors& data);
  // dq of so many rows, dk and dv of as many keys, which are sums over all rows, and all d_sinks;
  // from out and log-sum-exp as `data` has them.
  ExpectedGradients(const GradientTensors& data, int64_t most_rows);

  GradientDifference compare(const GradientTensors& data) const;
  int64_t compared_rows() const { return static_cast<int64_t>(dq_.rows.size()); }
  int64_t compared_keys() const { return static_cast<int64_t>(dk_.rows.size()); }

 private:
  // Rows of a gradient, numbered as [batch, heads, tokens that sequences have].
  struct Rows {
    std::vector<int64_t> rows;
    std::vector<float> wanted, roundings;  // [rows, dim]

    void allocate(int64_t dim);
    void put(size_t index, double sum, double rounding);
  };

  Rows dq_, dk_, dv_, d_sinks_;
};

// Rows of dq, and of dk and dv, that sequences have.
int64_t gradient_rows(const Problem& problem, const Tensors& tensors);
int64_t gradient_keys(const Problem& problem, const Tensors& tensors);

// As many rows and as many keys as the reference takes about 0.3 s for.
int64_t affordable_gradient_rows(const Problem& problem);

}  // namespace wh
