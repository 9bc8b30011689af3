// widehead._core: the C ABI for Python. The package around it gives names, defaults and types.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <new>

#include "append.h"
#include "call.h"
#include "merge.h"
#include "parallel.h"
#include "threads.h"

namespace widehead_python {
namespace {

Element element_named(const std::string& name) {
  for (const Element each : {Element::kFloat32, Element::kFloat16, Element::kBfloat16,
                             Element::kBool, Element::kInt32, Element::kInt64}) {
    if (name == name_of(each)) return each;
  }
  throw nb::value_error(
      ("dtype is \"" + name + "\"; valid: float32, float16, bfloat16, bool, int32, int64").c_str());
}

template <typename Value>
Value read_as(const char* name, nb::handle object, const char* valid) {
  Value value;
  if (!nb::try_cast(object, value)) {
    fail_type(std::string(name) + " is " + nb::cast<std::string>(nb::repr(object)) +
              "; it must be " + valid);
  }
  return value;
}

Spec make_spec(nb::handle from_shape, nb::handle from_dtype, nb::handle from_device) {
  auto shape = read_as<std::vector<int64_t>>("shape", from_shape, "a tuple of whole numbers");
  const auto dtype = read_as<std::string>("dtype", from_dtype, "a string, as in \"float32\"");
  const auto device = read_as<std::string>("device", from_device, "a string, as in \"cpu\"");
  const size_t colon = device.find(':');
  const std::string type = device.substr(0, colon);
  int32_t index = 0;
  bool is_valid = type == "cpu" || type == "cuda";
  if (is_valid && colon != std::string::npos) {
    const std::string digits = device.substr(colon + 1);
    is_valid = !digits.empty() && digits.size() < 5 &&
               digits.find_first_not_of("0123456789") == std::string::npos;
    if (is_valid) index = std::stoi(digits);
  }
  if (!is_valid) {
    throw nb::value_error(("device is \"" + device + "\"; valid: cpu, cuda, cuda:0 ...").c_str());
  }
  return {std::move(shape), element_named(dtype), type == "cpu" ? kDlCpu : kDlCuda, index};
}

// Uninitialised host memory that JAX can adopt without a copy, which takes its alignment.
nb::ndarray<nb::array_api> make_empty(const std::vector<int64_t>& shape, const std::string& dtype) {
  constexpr std::align_val_t kAlignment{64};
  struct Type {
    const char* name;
    nb::dlpack::dtype type;
  };
  constexpr Type kTypes[] = {
      {"float32", {2, 32, 1}}, {"float16", {2, 16, 1}}, {"bfloat16", {4, 16, 1}}};
  for (const Type& each : kTypes) {
    if (dtype != each.name) continue;
    size_t bytes = each.type.bits / 8;
    std::vector<size_t> extents;
    for (const int64_t size : shape) {
      extents.push_back(static_cast<size_t>(size));
      bytes *= static_cast<size_t>(size);
    }
    void* data = ::operator new(bytes == 0 ? 1 : bytes, kAlignment);
    nb::capsule owner(data, [](void* memory) noexcept { ::operator delete(memory, kAlignment); });
    return nb::ndarray<nb::array_api>(data, extents.size(), extents.data(), owner, nullptr,
                                      each.type);
  }
  throw nb::value_error(("dtype is \"" + dtype + "\"; it must be a float").c_str());
}

Limits make_limits(std::optional<uint64_t> workspace_bytes, const std::string& policy,
                   int64_t fused_above, const std::string& kernel, int32_t threads,
                   const std::string& precision, double longest_step_us, bool batch_invariant,
                   int64_t fresh_keys) {
  Limits made;
  wh_limits_init(&made.limits, sizeof(made.limits));
  if (workspace_bytes) made.limits.workspace_bytes = *workspace_bytes;
  const auto choose = [](const char* name, const std::string& value,
                         std::initializer_list<const char*> names) {
    int32_t index = 0;
    std::string valid;
    for (const char* each : names) {
      if (value == each) return index;
      valid += (index++ > 0 ? ", " : "") + std::string(each);
    }
    throw nb::value_error((std::string(name) + " is \"" + value + "\"; valid: " + valid).c_str());
  };
  made.limits.policy = choose("policy", policy, {"automatic", "fused", "fused_above"});
  made.limits.precision = choose("precision", precision, {"native", "high"});
  made.limits.fused_above = fused_above;
  made.limits.threads = threads;
  made.limits.longest_step_us = longest_step_us;
  made.limits.batch_invariant = batch_invariant ? 1 : 0;
  made.limits.fresh_keys = fresh_keys;
  made.kernel = kernel;
  return made;
}

constexpr const char* kReturnsLse = "return_log_sum_exp";

// `empty(q, shape, dtype)` makes arrays of q's library where that offers no allocator to C.
nb::object sdpa(nb::handle q, nb::handle k, nb::handle v, nb::handle scale, nb::handle causal,
                nb::handle window, nb::handle softcap, nb::handle mask, nb::handle sinks,
                nb::handle key_lengths, nb::handle key_starts, nb::handle layouts,
                nb::handle return_log_sum_exp, nb::handle out, const Limits& limits,
                int32_t threads, nb::handle stream, nb::handle empty) {
  Call call({q, k, v, scale, causal, window, softcap, mask, sinks, key_lengths, key_starts, layouts,
             yes(kReturnsLse, return_log_sum_exp), out, stream, Access::kRead});
  call.allocate(empty);
  call.run(limits.with_threads(threads));
  if (return_log_sum_exp.ptr() == Py_True) return nb::make_tuple(call.out, call.log_sum_exp);
  return std::move(call.out);
}

// Writes dq, dk, dv and d_sinks from what sdpa() answered and the gradient of out.
void backward(nb::handle q, nb::handle k, nb::handle v, nb::handle scale, nb::handle causal,
              nb::handle window, nb::handle softcap, nb::handle mask, nb::handle sinks,
              nb::handle key_lengths, nb::handle key_starts, nb::handle layouts, nb::handle out,
              nb::handle log_sum_exp, nb::handle d_out, nb::handle dq, nb::handle dk, nb::handle dv,
              nb::handle d_sinks, const Limits& limits, int32_t threads) {
  Call call({q, k, v, scale, causal, window, softcap, mask, sinks, key_lengths, key_starts, layouts,
             true, nb::none(), nb::none(), Access::kRead});
  call.read_gradients({out, log_sum_exp, d_out, dq, dk, dv, d_sinks});
  call.run(limits.with_threads(threads));
}

// The plan as text and as JSON, refused ones included.
nb::tuple plan(nb::handle q, nb::handle k, nb::handle v, nb::handle scale, nb::handle causal,
               nb::handle window, nb::handle softcap, nb::handle mask, nb::handle sinks,
               nb::handle key_lengths, nb::handle key_starts, nb::handle layouts,
               nb::handle return_log_sum_exp, nb::handle out, nb::handle gradients,
               const Limits& limits, int32_t threads, nb::handle stream) {
  Call call({q, k, v, scale, causal, window, softcap, mask, sinks, key_lengths, key_starts, layouts,
             yes(kReturnsLse, return_log_sum_exp), out, stream, Access::kPlan});
  if (yes("gradients", gradients)) call.turn_backward();
  const wh_limits c_limits = limits.with_threads(threads);
  wh_plan* made = nullptr;
  const wh_status status = wh_plan_create(&call.problem(), &c_limits, &made);
  if (status != WH_REFUSED || made == nullptr) check(status);
  const char* text = wh_plan_explain(made);
  const char* json = wh_plan_json(made);
  if (text == nullptr || json == nullptr) {
    wh_plan_destroy(made);
    throw std::bad_alloc();
  }
  nb::tuple answer = nb::make_tuple(text, json);
  wh_plan_destroy(made);
  return answer;
}

// One call of a rank's; `scale` to `log_sum_exp` as sdpa() has them.
nb::tuple sharded_sdpa(nb::handle q, nb::handle k, nb::handle v, nb::handle scale,
                       nb::handle causal, nb::handle window, nb::handle softcap, nb::handle mask,
                       nb::handle sinks, nb::handle return_log_sum_exp, nb::handle out,
                       const Ranks& ranks, const Limits& limits, int32_t threads, nb::handle group,
                       nb::handle allocate, nb::handle empty) {
  return parallel_attention(
      {q, k, v, scale, causal, window, softcap, nb::none(), sinks, nb::none(), nb::none(),
       nb::none(), yes(kReturnsLse, return_log_sum_exp), out, nb::none(), Access::kRead},
      mask, ranks, limits.with_threads(threads), group, allocate, empty);
}

nb::list kernels(int32_t device) {
  nb::list rows;
  for (size_t i = 0; wh_kernel_name(device, i) != nullptr; ++i) {
    rows.append(nb::make_tuple(wh_kernel_name(device, i), wh_kernel_summary(device, i)));
  }
  return rows;
}

std::string device_json(int32_t device, int32_t index) {
  const char* json = wh_device_json(device, index);
  if (json == nullptr) throw std::runtime_error(wh_last_error());
  return json;
}

NB_MODULE(_core, m) {
  // Objects that live until the interpreter ends are no news to its user.
  nb::set_leak_warnings(false);
  nb::class_<Spec>(m, "Spec").def(
      "__init__",
      [](Spec* self, nb::handle shape, nb::handle dtype, nb::handle device) {
        new (self) Spec(make_spec(shape, dtype, device));
      },
      nb::arg("shape"), nb::arg("dtype") = "float32", nb::arg("device") = "cpu");
  nb::class_<Limits>(m, "Limits")
      .def(
          "__init__",
          [](Limits* self, std::optional<uint64_t> workspace_bytes, const std::string& policy,
             int64_t fused_above, const std::string& kernel, int32_t threads,
             const std::string& precision, double longest_step_us, bool batch_invariant,
             int64_t fresh_keys) {
            new (self) Limits(make_limits(workspace_bytes, policy, fused_above, kernel, threads,
                                          precision, longest_step_us, batch_invariant, fresh_keys));
          },
          nb::arg("workspace_bytes").none(), nb::arg("policy"), nb::arg("fused_above"),
          nb::arg("kernel"), nb::arg("threads"), nb::arg("precision"), nb::arg("longest_step_us"),
          nb::arg("batch_invariant"), nb::arg("fresh_keys"));
  nb::class_<Ranks>(m, "Ranks")
      .def(nb::init<>())
      .def_rw("tokens_q", &Ranks::tokens_q)
      .def_rw("tokens_k", &Ranks::tokens_k)
      .def_rw("key_lengths", &Ranks::key_lengths, nb::arg("key_lengths").none())
      .def_rw("key_starts", &Ranks::key_starts, nb::arg("key_starts").none())
      .def_rw("strategy", &Ranks::strategy)
      .def_rw("link", &Ranks::link)
      .def_rw("timeout_s", &Ranks::timeout_s)
      .def_rw("rank", &Ranks::rank)
      .def_rw("ranks", &Ranks::ranks);
  // Positional only: parsing names would cost as much as reading the arrays.
  using H = nb::arg;
  m.def("sdpa", sdpa, H().none(), H().none(), H().none(), H().none(), H().none(), H().none(),
        H().none(), H().none(), H().none(), H().none(), H().none(), H().none(), H(), H().none(),
        H(), H(), H().none(), H().none());
  m.def("backward", backward, H(), H(), H(), H().none(), H(), H().none(), H().none(), H().none(),
        H().none(), H().none(), H().none(), H().none(), H(), H(), H(), H(), H(), H(), H().none(),
        H(), H());
  m.def("plan", plan, H().none(), H().none(), H().none(), H().none(), H().none(), H().none(),
        H().none(), H().none(), H().none(), H().none(), H().none(), H().none(), H(), H().none(),
        H(), H(), H(), H().none());
  m.def("append", append, H().none(), H().none(), H().none(), H().none(), H().none(), H().none());
  m.def("merge", merge, H(), H().none(), H().none(), H().none());
  m.def("sharded_sdpa", sharded_sdpa, H(), H(), H(), H().none(), H(), H().none(), H().none(),
        H().none(), H().none(), H(), H().none(), H(), H(), H(), H(), H(), H().none());
  m.def("empty", make_empty, nb::arg("shape"), nb::arg("dtype"));
  m.def("kernels", kernels, nb::arg("device"));
  m.def("device_json", device_json, nb::arg("device"), nb::arg("index"));
  m.def("use_torch_threads", use_torch_threads);
  m.def("version", wh_version);
}

}  // namespace
}  // namespace widehead_python
