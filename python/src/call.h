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
  nb::handle layouts;  // a tuple of what Layouts holds; None: everything is dense
  bool return_log_sum_exp;
  nb::handle out;
  nb::handle stream;
  Access access;  // of everything but what is written
};

// Where the sequences of a batch lie. Absent ones are None.
struct Layouts {
  nb::handle query_offsets, key_offsets, page_table, page_offsets;
  nb::handle len_q, len_k;  // the most of one sequence
};

// What the backward pass takes beside: what the forward pass answered, the gradient of out, and
// where the others go. None where there is none.
struct Gradients {
  nb::handle out, log_sum_exp;
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
  const wh_tensors& tensors() const { return tensors_; }
  // On the caller's stream.
  wh_run_options run_options() const;
  // Makes `out` and the log-sum-exp where the caller brought none, by empty(q, shape, dtype) when
  // q's library offers no allocator to C.
  void allocate(nb::handle empty);
  // Of queries and keys that may be more than q and k have.
  void read_mask(nb::handle object, int64_t len_q, int64_t len_k);
  // Makes it the backward pass, whose gradients are contiguous until they are read.
  void turn_backward();
  void read_gradients(const Gradients& gradients);
  void run(const wh_limits& limits);
  // The caches, for wh_append(). Throws ValueError where one is read-only.
  void write_into(wh_appended& appended) const;
  // Throws ValueError for a tensor that is not where q is.
  void expect_same_device(const Tensor& tensor) const;

  nb::object out, log_sum_exp;

 private:
  // Numbers in the caller's array, or copied from what is no int32 array.
  struct Integers {
    std::optional<Tensor> tensor;
    std::vector<int32_t> copy;
    const int32_t* data = nullptr;   // null: of a Spec
    std::array<int64_t, 2> shape{};  // of one dimension: [0]
    int64_t stride = 0;              // of a table's rows
  };
  // What they may hold. Beyond int32 they cannot be handed on; the C API checks the rest.
  struct Range {
    int64_t most;
    const char* name;
    int64_t least = 0;  // entries of a table that nothing makes visible may be anything
  };

  void read_layouts(const Layouts& layouts, const Arguments& arguments);
  void read_pages(const Layouts& layouts);
  void expect_count(const char* name, const Integers& numbers, int64_t count,
                    const char* shape) const;
  const int32_t* host_data(const Integers& integers) const {
    return q_.on_cuda() ? nullptr : integers.data;
  }
  void read_out(nb::handle object, Access access);
  void read_log_sum_exp(nb::handle object, Access access);
  void read_options(const Arguments& arguments);
  void read_sinks(nb::handle object);
  // Arrays of `ndim` dimensions; lists of one, on the host.
  void read_integers(const char* name, nb::handle object, int ndim, const Range& range,
                     Integers& integers);
  const int32_t* read_keys(const char* name, nb::handle object, const Range& range, Integers& keys);
  const int32_t* read_offsets(const char* name, nb::handle object, const Range& range,
                              Integers& offsets);
  // Of widehead.Quantised: codes become the elements that they stand for, in shape and strides.
  void read_quantised(nb::handle object, Tensor& codes, int32_t& format);
  void read_scales(nb::handle object, const Tensor& codes, std::optional<Tensor>& scales,
                   int32_t& kind, int64_t (&strides)[4], const float*& data);
  // Reads a gradient that has the shape and type of `of`, and its strides.
  void* read_gradient(std::optional<Tensor>& gradient, nb::handle object, const char* name,
                      Access access, const Tensor& of, int64_t (&strides)[4]);

  nb::handle q_object_, stream_;
  Access access_;
  Tensor q_, k_, v_;
  std::optional<Tensor> out_, log_sum_exp_, mask_, sinks_, scales_k_, scales_v_;
  std::optional<Tensor> d_out_, dq_, dk_, dv_, d_sinks_;
  Integers key_lengths_, key_starts_, query_offsets_, key_offsets_, page_table_, page_offsets_;
  wh_problem problem_;
  wh_tensors tensors_;
};

// True or False, of the argument with this name.
bool yes(const char* name, nb::handle object);
[[noreturn]] void fail_value(const std::string& message);
[[noreturn]] void fail_type(const std::string& message);
// What lies in memory: the codes of a widehead.Quantised, or the array itself.
nb::handle stored_of(nb::handle object);
// Throws TypeError for other types than those of q, k and v.
int32_t dtype_of(const Tensor& tensor);
// Throws ValueError, which calls the extents by `names`.
void expect_shape(const Tensor& tensor, std::initializer_list<int64_t> shape, const char* names);

// Of a call on `tensor`'s device: on `stream` where the caller named one, on the threads of
// executor().
wh_run_options run_options_of(const Tensor& tensor, nb::handle stream);

// Throws the Python exception that the status means, with the C API's message.
void check(wh_status status);

}  // namespace widehead_python
