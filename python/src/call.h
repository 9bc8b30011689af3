// One call's arrays and options as the C API wants them.
#pragma once

#include <widehead/widehead.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "tensor.h"

namespace widehead_python {

// What the Python functions take, unread. Absent ones are None.
struct Arguments {
  nb::handle q, k, v;
  nb::handle scale, causal, window, softcap;
  nb::handle mask, sinks, key_lengths, key_starts;
  bool return_log_sum_exp;
  nb::handle out, log_sum_exp;
  nb::handle stream;
  Access access;  // of everything but what is written
};

// What the backward pass takes beside: the gradient of out, and where the others go. None where
// there is none.
struct Gradients {
  nb::handle d_out, dq, dk, dv, d_sinks;
};

struct Limits {
  wh_limits limits;
  std::string kernel;  // limits.kernel points here

  // With `threads` where the limits leave them open.
  wh_limits with_threads(int32_t threads) const;
};

class Call {
 public:
  // Throws ValueError or TypeError, which name the argument, its value and what would be valid.
  explicit Call(const Arguments& arguments);

  const wh_problem& problem() const { return problem_; }
  // Makes `out` and the log-sum-exp where the caller brought none, by empty(q, shape, dtype) when
  // q's library offers no allocator to C.
  void allocate(nb::handle empty);
  // Makes it the backward pass.
  void read_gradients(const Gradients& gradients);
  void run(const wh_limits& limits);

  nb::object out, log_sum_exp;

 private:
  // A number for each of the batch, in the caller's array or copied from what is no int32 array.
  struct Keys {
    std::optional<Tensor> tensor;
    std::vector<int32_t> copy;
  };

  void read_out(nb::handle object);
  void read_log_sum_exp(nb::handle object);
  void read_options(const Arguments& arguments);
  void read_mask(nb::handle object);
  void read_sinks(nb::handle object);
  const int32_t* read_keys(const char* name, nb::handle object, Keys& keys);
  // Of widehead.Quantised: codes become the elements that they stand for, in shape and strides.
  void read_quantised(nb::handle object, Tensor& codes, int32_t& format);
  void read_scales(nb::handle object, const Tensor& codes, std::optional<Tensor>& scales,
                   int32_t& kind, int64_t (&strides)[4], const float*& data);
  void expect_same_device(const Tensor& tensor) const;
  // Reads a gradient that has the shape and type of `of`, and its strides.
  void* read_gradient(std::optional<Tensor>& gradient, nb::handle object, const char* name,
                      Access access, const Tensor& of, int64_t (&strides)[4]);

  nb::handle q_object_, stream_;
  Access access_;
  Tensor q_, k_, v_;
  std::optional<Tensor> out_, log_sum_exp_, mask_, sinks_, scales_k_, scales_v_;
  std::optional<Tensor> d_out_, dq_, dk_, dv_, d_sinks_;
  Keys key_lengths_, key_starts_;
  wh_problem problem_;
  wh_tensors tensors_;
};

// Throws TypeError for other types than those of q, k and v.
int32_t dtype_of(const Tensor& tensor);
// Throws ValueError, which calls the extents by `names`.
void expect_shape(const Tensor& tensor, std::initializer_list<int64_t> shape, const char* names);

// Throws the Python exception that the status means, with the C API's message.
void check(wh_status status);

}  // namespace widehead_python
