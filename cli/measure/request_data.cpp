#include "measure/request_data.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/sequence.h"

namespace wh::cli {
namespace {

// The bound holds for scores of about N(0, 1). An error of a score is one of its weight, and grows
// with the score: a --scale that makes them wider makes the bound wider.
double wider_by(const Problem& p) {
  return std::max(1.0, std::fabs(p.scale) * std::sqrt(static_cast<double>(p.dim_qk)));
}

}  // namespace

Result<RequestData> RequestData::make(const Request& request, uint64_t seed) {
  RequestData made;
  if (request.problem.pass == Pass::kForward) {
    made.data_ = HostTensors(request.input(seed));
    return made;
  }
  Result<GradientTensors> data = GradientTensors::after_a_run(request.input(seed));
  if (!data.ok()) return data.status();
  made.data_ = std::move(*data);
  return made;
}

Tensors RequestData::tensors() const {
  return std::visit([](const auto& data) { return data.tensors(); }, data_);
}
int64_t RequestData::bytes() const {
  return std::visit([](const auto& data) { return data.bytes(); }, data_);
}

void RequestData::expect() {
  if (const auto* forward = std::get_if<HostTensors>(&data_)) {
    expected_ =
        expected_answer(forward->problem, forward->tensors(), affordable_rows(forward->problem));
  } else {
    const auto& backward = std::get<GradientTensors>(data_);
    expected_gradients_.emplace(backward, affordable_gradient_rows(backward.problem()));
  }
}

Accuracy RequestData::accuracy() const {
  Accuracy accuracy;
  if (const auto* forward = std::get_if<HostTensors>(&data_)) {
    const Problem& p = forward->problem;
    const Errors errors = errors_of(p, forward->tensors(), *expected_);
    accuracy.relative_rms = errors.relative_rms();
    accuracy.largest = errors.largest();
    accuracy.tolerance = tolerance_of(p.dtype_q) * wider_by(p);
    accuracy.compared_rows = static_cast<int64_t>(expected_->rows.size());
    accuracy.reference = fmt::format("float64 on {} of {} rows", accuracy.compared_rows,
                                     query_rows(p, forward->tensors()));
    return accuracy;
  }
  const auto& backward = std::get<GradientTensors>(data_);
  const Problem& p = backward.problem();
  const GradientDifference difference = expected_gradients_->compare(backward);
  accuracy.relative_rms = difference.relative_rms;
  accuracy.largest = difference.largest;
  accuracy.tolerance = difference.tolerance * wider_by(p);
  accuracy.compared_rows = expected_gradients_->compared_rows();
  accuracy.compared_keys = expected_gradients_->compared_keys();
  accuracy.reference = fmt::format("float64 on {} of {} rows and {} of {} keys",
                                   accuracy.compared_rows, gradient_rows(p, backward.tensors()),
                                   accuracy.compared_keys, gradient_keys(p, backward.tensors()));
  return accuracy;
}

}  // namespace wh::cli
