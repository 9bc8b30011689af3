#include "verify/gradients.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "core/element.h"
#include "core/executor.h"
#include "cpu/reference/backward.h"
#include "cpu/reference/reference.h"
#include "verify/elements.h"
#include "verify/errors.h"
#include "verify/random_rows.h"
#include "verify/rows.h"

namespace wh {
namespace {

constexpr std::byte kPoison{0xff};

using Extents = std::array<int64_t, 4>;

Extents extents_q(const Problem& p) { return {p.batch, p.heads_q, p.len_q, p.dim_qk}; }
Extents extents_k(const Problem& p) { return {p.batch, p.heads_kv, p.len_k, p.dim_qk}; }
Extents extents_v(const Problem& p) { return {p.batch, p.heads_kv, p.len_k, p.dim_v}; }
Extents extents_out(const Problem& p) { return {p.batch, p.heads_q, p.len_q, p.dim_v}; }

Strides dense(const Extents& extents) { return dense_strides(extents[1], extents[2], extents[3]); }

Input forward_input(Input input) {
  input.problem.pass = Pass::kForward;
  input.problem.wants_log_sum_exp = true;
  input.problem.f32_out = false;  // the backward pass takes no other type than d_out has
  return input;
}

Problem backward_problem(const Input& input) {
  Problem p = forward_input(input).problem;
  p.pass = Pass::kBackward;
  p.stride_dq = p.stride_q;
  p.stride_dk = p.stride_k[1] == 0 ? dense(extents_k(p)) : p.stride_k;
  if (!p.values_in_keys) p.stride_dv = p.stride_v[1] == 0 ? dense(extents_v(p)) : p.stride_v;
  switch (mix(input.seed) % 4) {
    case 0:
      break;  // one number for all, as from a sum
    case 1:
      p.stride_d_out = {p.len_q * p.heads_q * p.dim_v, p.dim_v, p.heads_q * p.dim_v, 1};
      break;
    default:
      p.stride_d_out = p.stride_out;
  }
  return p;
}

// Calls body(element's indices) for every element.
template <typename Body>
void for_each_element(const Extents& extents, Body&& body) {
  for (int64_t b = 0; b < extents[0]; ++b) {
    for (int64_t h = 0; h < extents[1]; ++h) {
      for (int64_t i = 0; i < extents[2]; ++i) {
        for (int64_t d = 0; d < extents[3]; ++d) body(b, h, i, d);
      }
    }
  }
}

// A tensor widened to f32, dense.
std::vector<float> widened(const void* data, Dtype dtype, const Extents& extents,
                           const Strides& stride) {
  std::vector<float> values;
  values.reserve(static_cast<size_t>(extents[0] * extents[1] * extents[2] * extents[3]));
  for_each_element(extents, [&](int64_t b, int64_t h, int64_t i, int64_t d) {
    values.push_back(load_element(data, dtype, offset_of(stride, b, h, i, d)));
  });
  return values;
}

// Below it 16-bit types lose bits, and cpu_backward flushes weights to 0.
double smallest(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF16:
      return 0x1p-24;
    case Dtype::kF32:
    case Dtype::kBf16:
      return 0x1p-126;
  }
  __builtin_unreachable();  // validate() knows no other
}

uint64_t fingerprint_of(const GuardedTensor& d_out, const HostTensors& inputs) {
  return mix(d_out.fingerprint() ^ mix(inputs.out.fingerprint()) ^
             mix(mix(inputs.log_sum_exp.fingerprint())));
}

}  // namespace

GradientTensors::GradientTensors(const Input& input)
    : problem_(backward_problem(input)), inputs_(forward_input(input)) {
  const Problem& p = problem_;
  const Tensors forward = inputs_.tensors();
  std::vector<double> scratch(cpu::reference_workspace_bytes(p) / sizeof(double));
  cpu::reference_rows(inputs_.problem, forward, 0, p.batch * p.heads_q * p.len_q, scratch.data());

  const TensorBytes bytes = tensor_bytes(p);
  d_out_ = GuardedTensor(bytes.d_out);
  dq_ = GuardedTensor(bytes.dq);
  dk_ = GuardedTensor(bytes.dk);
  dv_ = GuardedTensor(bytes.dv);
  d_sinks_ = GuardedTensor(bytes.d_sinks);
  RowRandom random(input.seed, 99, 0);
  for_each_element(extents_out(p), [&](int64_t b, int64_t h, int64_t i, int64_t d) {
    put(d_out_.data(), p.dtype_q, offset_of(p.stride_d_out, b, h, i, d), random.normal());
  });
  fingerprint_ = fingerprint_of(d_out_, inputs_);
}

Tensors GradientTensors::tensors() {
  Tensors t = inputs_.tensors();
  t.d_out = d_out_.data();
  t.dq = dq_.data();
  t.dk = dk_.data();
  if (!problem_.values_in_keys) t.dv = dv_.data();
  if (problem_.has_sinks) t.d_sinks = reinterpret_cast<float*>(d_sinks_.data());
  return t;
}

void GradientTensors::poison_outputs() {
  for (GuardedTensor* tensor : {&dq_, &dk_, &dv_, &d_sinks_}) {
    std::fill_n(tensor->data(), tensor->size(), kPoison);
  }
}

std::string GradientTensors::damage() const {
  const Problem& p = problem_;
  const struct {
    const char* name;
    const GuardedTensor& tensor;
    Extents extents;
    const Strides& stride;
    Dtype dtype;
  } outputs[] = {{"dq", dq_, extents_q(p), p.stride_dq, p.dtype_q},
                 {"dk", dk_, extents_k(p), p.stride_dk, p.dtype_kv},
                 {"dv", dv_, extents_v(p), p.stride_dv, p.dtype_kv},
                 {"d_sinks", d_sinks_, {1, 1, 1, p.heads_q}, {0, 0, 0, 1}, Dtype::kF32}};
  for (const auto& one : outputs) {
    if (!one.tensor.guards_intact()) return fmt::format("memory around {} was written", one.name);
    if (one.tensor.size() == 0) continue;
    std::vector<bool> is_owned(static_cast<size_t>(one.tensor.size()));
    for_each_element(one.extents, [&](int64_t b, int64_t h, int64_t i, int64_t d) {
      const int64_t at = offset_of(one.stride, b, h, i, d) * bytes_of(one.dtype);
      std::fill_n(is_owned.begin() + at, bytes_of(one.dtype), true);
    });
    for (size_t i = 0; i < is_owned.size(); ++i) {
      if (!is_owned[i] && one.tensor.data()[i] != kPoison) {
        return fmt::format("byte {} between the elements of {} was written", i, one.name);
      }
    }
  }
  if (fingerprint_of(d_out_, inputs_) != fingerprint_) {
    return "d_out, out or log_sum_exp, or memory around it, was written: an input";
  }
  return inputs_.damage();
}

std::vector<std::byte> GradientTensors::answer() const {
  std::vector<std::byte> bytes;
  for (const GuardedTensor* tensor : {&dq_, &dk_, &dv_, &d_sinks_}) {
    bytes.insert(bytes.end(), tensor->data(), tensor->data() + tensor->size());
  }
  return bytes;
}

ExpectedGradients::ExpectedGradients(const GradientTensors& data) {
  // The same problem with everything widened to f32, so that gradients are rounded to f32 alone.
  Problem p = data.problem_;
  Tensors t = const_cast<GradientTensors&>(data).tensors();
  const auto q = widened(t.q, p.dtype_q, extents_q(p), p.stride_q);
  const auto k = widened(t.k, p.dtype_kv, extents_k(p), p.stride_k);
  const auto v = widened(t.v, p.dtype_kv, extents_v(p), p.stride_v);
  const auto d_out = widened(t.d_out, p.dtype_q, extents_out(p), p.stride_d_out);
  std::vector<float> mask;
  if (p.mask == MaskKind::kAdditiveQ) {
    const Extents extents{p.batch, p.heads_q, p.len_q, p.len_k};
    mask = widened(t.mask, p.dtype_q, extents, p.stride_mask);
    t.mask = mask.data();
    p.stride_mask = dense(extents);
    p.mask = MaskKind::kAdditiveF32;
  }
  p.dtype_q = p.dtype_kv = Dtype::kF32;
  p.stride_q = p.stride_dq = dense(extents_q(p));
  p.stride_k = p.stride_dk = dense(extents_k(p));
  p.stride_v = p.stride_dv = dense(extents_v(p));
  p.stride_d_out = dense(extents_out(p));
  t.q = q.data();
  t.k = k.data();
  t.v = v.data();
  t.d_out = d_out.data();
  for (const auto& [sums, answer] :
       {std::pair{cpu::Sums::kGradients, &gradients_}, {cpu::Sums::kRoundings, &roundings_}}) {
    answer->dq.resize(q.size());
    answer->dk.resize(k.size());
    answer->dv.resize(v.size());
    answer->d_sinks.resize(static_cast<size_t>(p.heads_q));
    t.dq = answer->dq.data();
    t.dk = answer->dk.data();
    t.dv = answer->dv.data();
    t.d_sinks = answer->d_sinks.data();
    parallel(default_executor(), static_cast<int32_t>(p.heads_kv), [&, sums = sums](int32_t head) {
      std::vector<double> scratch(cpu::reference_backward_bytes(p) / sizeof(double) + 8);
      void* aligned =
          reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
      Progress unwatched;
      cpu::reference_backward(p, t, head, sums, aligned, unwatched);
    });
  }
  const auto add = [](const std::vector<float>& gradients, std::vector<float>& roundings) {
    for (size_t i = 0; i < gradients.size(); ++i) {
      roundings[i] = std::hypot(roundings[i], gradients[i]);
    }
  };
  add(gradients_.dq, roundings_.dq);
  add(gradients_.dk, roundings_.dk);
  add(gradients_.dv, roundings_.dv);
  add(gradients_.d_sinks, roundings_.d_sinks);
}

GradientDifference ExpectedGradients::compare(const GradientTensors& data) const {
  const Problem& p = data.problem_;
  GradientDifference difference;
  const auto report = [&](std::string message) {
    if (difference.message.empty()) difference.message = std::move(message);
  };
  const auto compare_tensor = [&](const char* name, const GuardedTensor& tensor, Dtype dtype,
                                  const Extents& extents, const Strides& stride,
                                  const std::vector<float>& wanted,
                                  const std::vector<float>& roundings) {
    const double tolerance = 2 * tolerance_of(p.dtype_q) + tolerance_of(dtype);
    double rounding_squares = 0, error_squares = 0, worst_error = 0;
    for (const float rounding : roundings) {
      if (std::isfinite(rounding)) rounding_squares += static_cast<double>(rounding) * rounding;
    }
    const double rms =
        std::sqrt(rounding_squares / std::max<double>(1, static_cast<double>(roundings.size())));
    size_t element = 0;
    for_each_element(extents, [&](int64_t b, int64_t h, int64_t i, int64_t d) {
      const float want = wanted[element], rounding = roundings[element];
      ++element;
      const float have = load_element(tensor.data(), dtype, offset_of(stride, b, h, i, d));
      if (std::isfinite(want) != std::isfinite(have)) {
        return report(
            fmt::format("{}[{}, {}, {}, {}] is {}, expected {}", name, b, h, i, d, have, want));
      }
      if (!std::isfinite(want)) return;
      const double error = std::fabs(static_cast<double>(have) - want);
      error_squares += error * error;
      const double bound = 8 * tolerance * std::max<double>(rms, rounding) + smallest(dtype);
      if (error > bound) {
        report(fmt::format("{}[{}, {}, {}, {}] is {}, expected {}: off by {:.3g}, bound {:.3g}",
                           name, b, h, i, d, have, want, error, bound));
      }
      worst_error = std::max(worst_error, error);
    });
    if (worst_error <= smallest(dtype)) return;
    const double share = std::sqrt(error_squares / rounding_squares) / tolerance;
    difference.worst_share = std::max(difference.worst_share, share);
    if (share > 1) {
      report(fmt::format("{} is off by {:.3g} of what is summed, tolerance {:.3g}", name,
                         share * tolerance, tolerance));
    }
  };
  compare_tensor("dq", data.dq_, p.dtype_q, extents_q(p), p.stride_dq, gradients_.dq,
                 roundings_.dq);
  compare_tensor("dk", data.dk_, p.dtype_kv, extents_k(p), p.stride_dk, gradients_.dk,
                 roundings_.dk);
  if (!p.values_in_keys) {
    compare_tensor("dv", data.dv_, p.dtype_kv, extents_v(p), p.stride_dv, gradients_.dv,
                   roundings_.dv);
  }
  if (p.has_sinks) {
    compare_tensor("d_sinks", data.d_sinks_, Dtype::kF32, {1, 1, 1, p.heads_q}, {0, 0, 0, 1},
                   gradients_.d_sinks, roundings_.d_sinks);
  }
  return difference;
}

}  // namespace wh
