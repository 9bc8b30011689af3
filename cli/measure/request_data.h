// The tensors of a request, with random values, and how far an answer in them is from float64.
#pragma once

#include <optional>
#include <string>
#include <variant>

#include "input/problem_flags.h"
#include "verify/answer.h"
#include "verify/gradients.h"

namespace wh::cli {

// Of out, or of the gradient that is furthest from its bound.
struct Accuracy {
  double relative_rms = 0, largest = 0;
  double tolerance = 0;   // of relative_rms
  std::string reference;  // what it was compared with
  int64_t compared_rows = 0;
  int64_t compared_keys = 0;  // whose dk and dv were; 0 in the forward pass
};

class RequestData {
 public:
  RequestData() = default;
  // For the backward pass it runs the forward pass, whose out and log-sum-exp that starts from.
  static Result<RequestData> make(const Request& request, uint64_t seed);

  Tensors tensors() const;
  int64_t bytes() const;

  // Works out what a sample should be, as large as takes about 0.3 s.
  void expect();
  // Of what a run left in the tensors; after expect().
  Accuracy accuracy() const;

 private:
  std::variant<HostTensors, GradientTensors> data_;
  std::optional<Expected> expected_;
  std::optional<ExpectedGradients> expected_gradients_;
};

}  // namespace wh::cli
