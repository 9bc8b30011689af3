#include "merge.h"

#include <widehead/widehead.h>

#include <algorithm>
#include <deque>

#include "call.h"

namespace widehead_python {
namespace {

void expect_f32(const Tensor& tensor) {
  if (tensor.element == Element::kFloat32) return;
  throw nb::type_error(
      (std::string(tensor.name) + " is " + tensor.dtype_text() + "; it must be float32").c_str());
}

void expect_with(const Tensor& first, const Tensor& tensor) {
  if (tensor.device_type == first.device_type && tensor.device_id == first.device_id) return;
  fail_value(std::string(tensor.name) + " is on " + tensor.device_text() + "; it must be where " +
             first.name + " is, on " + first.device_text());
}

struct Pair {
  Tensor out, log_sum_exp;

  Pair(const nb::tuple& part, const std::string& out_name, const std::string& lse_name,
       nb::handle stream, Access access)
      : out(part[0], out_name.c_str(), stream, access),
        log_sum_exp(part[1], lse_name.c_str(), stream, access) {}

  wh_partial c_partial() const {
    wh_partial c{};
    c.out = out.data;
    c.log_sum_exp = static_cast<const float*>(log_sum_exp.data);
    c.dtype = dtype_of(out);
    std::copy_n(out.strides.begin(), 4, c.stride_out);
    std::copy_n(log_sum_exp.strides.begin(), 3, c.stride_log_sum_exp);
    return c;
  }
};

}  // namespace

nb::tuple merge(const nb::list& parts, nb::handle sinks, nb::handle stream, nb::handle empty) {
  std::deque<std::string> names;  // tensors keep pointers to them
  std::deque<Pair> pairs;
  std::vector<wh_partial> c_parts;
  for (size_t i = 0; i < nb::len(parts); ++i) {
    const std::string part = "parts[" + std::to_string(i) + "]";
    const nb::handle item = parts[i];
    if (!nb::isinstance<nb::tuple>(item) || nb::len(item) != 2) {
      fail_value(part + " is " + nb::cast<std::string>(nb::repr(item.type())) +
                 "; it must be a tuple (out, log_sum_exp)");
    }
    const std::string& out_name = names.emplace_back(part + ".out");
    const std::string& lse_name = names.emplace_back(part + ".log_sum_exp");
    pairs.emplace_back(nb::borrow<nb::tuple>(item), out_name, lse_name, stream, Access::kRead);
    const Pair& pair = pairs.back();
    const Tensor& first = pairs.front().out;
    if (first.ndim != 4) {
      fail_value(std::string(first.name) + " is " + first.shape_text() +
                 "; it must have 4 dimensions: [batch, heads_q, len_q, dim_v]");
    }
    const auto& s = first.shape;
    expect_shape(pair.out, {s[0], s[1], s[2], s[3]}, "[batch, heads_q, len_q, dim_v]");
    expect_shape(pair.log_sum_exp, {s[0], s[1], s[2]}, "[batch, heads_q, len_q]");
    expect_f32(pair.log_sum_exp);
    expect_with(first, pair.out);
    expect_with(first, pair.log_sum_exp);
    c_parts.push_back(pair.c_partial());
  }
  const Tensor& first = pairs.front().out;
  const nb::handle first_object = parts[0][0];
  const auto make = [&](int ndim, Element element) {
    nb::object made = allocate_like(first_object, first, first.shape, ndim, element);
    if (made.is_valid()) return made;
    const auto& s = first.shape;
    return nb::borrow(
        empty(first_object,
              ndim == 4 ? nb::make_tuple(s[0], s[1], s[2], s[3]) : nb::make_tuple(s[0], s[1], s[2]),
              name_of(element)));
  };
  const nb::tuple made = nb::make_tuple(make(4, first.element), make(3, Element::kFloat32));
  const Pair target(made, "out", "log_sum_exp", stream, Access::kWrite);
  const wh_partial to = target.c_partial();
  wh_merged merged;
  wh_merged_init(&merged, sizeof(merged));
  merged.device = first.on_cuda() ? WH_CUDA : WH_CPU;
  merged.device_index = first.device_id;
  merged.dtype = to.dtype;
  merged.batch = first.shape[0];
  merged.heads_q = first.shape[1];
  merged.len_q = first.shape[2];
  merged.dim_v = first.shape[3];
  merged.out = target.out.data;
  merged.log_sum_exp = static_cast<float*>(target.log_sum_exp.data);
  std::copy_n(to.stride_out, 4, merged.stride_out);
  std::copy_n(to.stride_log_sum_exp, 3, merged.stride_log_sum_exp);
  std::optional<Tensor> read_sinks;
  if (!sinks.is_none()) {
    read_sinks.emplace(sinks, "sinks", stream, Access::kRead);
    expect_shape(*read_sinks, {first.shape[1]}, "[heads_q]");
    expect_f32(*read_sinks);
    expect_with(first, *read_sinks);
    if (first.shape[1] > 1 && read_sinks->strides[0] != 1) {
      fail_value("sinks has a stride of " + std::to_string(read_sinks->strides[0]) +
                 "; it must be contiguous");
    }
    merged.sinks = static_cast<const float*>(read_sinks->data);
  }
  const wh_run_options options = run_options_of(first, stream);
  wh_status status = WH_OK;
  {
    const nb::gil_scoped_release release;
    status = wh_merge(&merged, c_parts.data(), c_parts.size(), &options);
  }
  check(status);
  return made;
}

}  // namespace widehead_python
