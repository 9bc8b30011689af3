#include "call.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <thread>

#include "threads.h"

namespace widehead_python {
namespace {

std::string text_of(nb::handle object) { return nb::cast<std::string>(nb::repr(object)); }

void expect_dimensions(const Tensor& tensor, int count, const char* names) {
  if (tensor.ndim == count) return;
  fail_value(std::string(tensor.name) + " is " + tensor.shape_text() + "; it must have " +
             std::to_string(count) + " dimensions: " + names);
}

// The extents of a tensor by its layout, WH_QUERIES_DENSE and so on.
constexpr const char* kNamesQ[] = {"[batch, heads_q, len_q, dim_qk]", "[total_q, heads_q, dim_qk]"};
constexpr const char* kNamesOut[] = {"[batch, heads_q, len_q, dim_v]", "[total_q, heads_q, dim_v]"};
constexpr const char* kNamesLse[] = {"[batch, heads_q, len_q]", "[total_q, heads_q]"};
struct KeyNames {
  const char *k, *k_with_q, *v, *v_with_k, *scales;
};
constexpr KeyNames kNamesKv[] = {
    {"[batch, heads_kv, len_k, dim_qk]",
     "[batch, heads_kv, len_k, dim_qk] with q's batch and dim_qk",
     "[batch, heads_kv, len_k, dim_v]",
     "[batch, heads_kv, len_k, dim_v] with k's batch, heads and length",
     "[batch, heads_kv, len_k, 1] or [batch, heads_kv, 1, dim]"},
    {"[total_k, heads_kv, dim_qk]", "[total_k, heads_kv, dim_qk] with q's dim_qk",
     "[total_k, heads_kv, dim_v]", "[total_k, heads_kv, dim_v] with k's tokens and heads",
     "[total_k, heads_kv, 1] or [1, heads_kv, dim]"},
    {"[pages, heads_kv, page_size, dim_qk]", "[pages, heads_kv, page_size, dim_qk] with q's dim_qk",
     "[pages, heads_kv, page_size, dim_v]",
     "[pages, heads_kv, page_size, dim_v] with k's pages and heads",
     "[pages, heads_kv, page_size, 1] or [1, heads_kv, 1, dim]"}};
constexpr int64_t kMostLength = std::numeric_limits<int32_t>::max();

void read_as(Tensor& tensor, const char* names, bool is_packed) {
  expect_dimensions(tensor, is_packed ? 3 : 4, names);
  if (is_packed) tensor.view_packed();
}

template <typename Type>
Type number(const char* name, nb::handle object) {
  Type value{};
  if (!nb::try_cast(object, value)) {
    fail_type(std::string(name) + " is " + text_of(object) + "; it must be " +
              (std::is_integral_v<Type> ? "a whole number" : "a number"));
  }
  if constexpr (std::is_same_v<Type, float>) {  // a softcap that became 0 would be none
    double exact{};
    if (value == 0 && nb::try_cast(object, exact) && exact != 0) {
      fail_value(std::string(name) + " is " + text_of(object) + "; it is 0 in float32");
    }
  }
  return value;
}

int32_t causal_of(nb::handle causal) {
  if (causal.ptr() == Py_False) return WH_CAUSAL_NONE;
  if (causal.ptr() == Py_True) return WH_CAUSAL_BOTTOM_RIGHT;
  std::string name;
  if (nb::try_cast(causal, name)) {
    if (name == "bottom_right") return WH_CAUSAL_BOTTOM_RIGHT;
    if (name == "top_left") return WH_CAUSAL_TOP_LEFT;
  }
  fail_value("causal is " + text_of(causal) +
             "; valid: False, True (the same as \"bottom_right\"), \"bottom_right\", \"top_left\"");
}

int64_t window_side(nb::handle window, nb::handle side) {
  if (side.is_none()) return WH_UNLIMITED;
  int64_t keys = 0;
  if (!nb::try_cast(side, keys) || keys < 0 || keys > kMostLength) {
    fail_value("window is " + text_of(window) + "; each side must be a number of keys from 0 to " +
               std::to_string(kMostLength) + ", or None for no limit");
  }
  return keys;
}

// Lets Ctrl-C end a long call. Signals reach Python on its main thread alone, which works on the
// call like every other thread, so it comes by here between two steps.
struct Interrupt {
  using Clock = std::chrono::steady_clock;

  std::thread::id caller = std::this_thread::get_id();
  Clock::time_point last = Clock::now();

  static int32_t check(void* context, double) {
    // Taking the GIL while other Python threads work costs up to 5 ms, their switch interval.
    constexpr auto kInterval = std::chrono::milliseconds(50);
    auto& self = *static_cast<Interrupt*>(context);
    if (std::this_thread::get_id() != self.caller) return 0;
    const Clock::time_point now = Clock::now();
    if (now - self.last < kInterval) return 0;
    self.last = now;
    const nb::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0 ? 1 : 0;
  }
};

bool is_quantised(nb::handle object) {
  static PyObject* const type =
      nb::getattr(nb::module_::import_("widehead._quantised"), "Quantised").release().ptr();
  return Py_TYPE(object.ptr()) == reinterpret_cast<PyTypeObject*>(type);
}

struct Format {
  const char* name;
  int32_t number;
  int64_t block_elements, block_bytes;
};
constexpr Format kFormats[] = {{"e4m3", WH_E4M3, 1, 1},
                               {"int8", WH_INT8, 1, 1},
                               {"q8_0", WH_Q8_0, 32, 34},
                               {"q4_0", WH_Q4_0, 32, 18}};

// The most of one sequence, which `offsets` or lengths tell where the caller does not.
int64_t longest(const char* name, nb::handle given, const char* source, const int32_t* values,
                int64_t count, bool are_offsets) {
  if (!given.is_none()) return number<int64_t>(name, given);
  if (values == nullptr && count > 0) {
    fail_value(std::string(name) + " must be given, the most of one sequence: " + source +
               " cannot be read on the host");
  }
  int64_t most = 0;
  for (int64_t i = are_offsets ? 1 : 0; i < count; ++i) {
    most = std::max<int64_t>(most, int64_t{values[i]} - (are_offsets ? values[i - 1] : 0));
  }
  return most;
}

Layouts layouts_of(nb::handle object) {
  const nb::handle none = Py_None;
  if (object.is_none()) return {none, none, none, none, none, none};
  const auto all = nb::borrow<nb::tuple>(object);
  return {all[0], all[1], all[2], all[3], all[4], all[5]};
}

void expect_none(const char* name, nb::handle object, const char* needs) {
  if (object.is_none()) return;
  fail_value(std::string(name) + " is given without " + needs + "; leave it away, or pass both");
}

}  // namespace

// A Quantised, which the caller holds, keeps its codes.
nb::handle stored_of(nb::handle object) {
  if (!is_quantised(object)) return object;
  const nb::object codes = nb::getattr(object, "codes");
  return codes;
}

bool yes(const char* name, nb::handle object) {
  if (object.ptr() == Py_True || object.ptr() == Py_False) return object.ptr() == Py_True;
  fail_type(std::string(name) + " is " + text_of(object) + "; it must be True or False");
}

void fail_value(const std::string& message) { throw nb::value_error(message.c_str()); }
void fail_type(const std::string& message) { throw nb::type_error(message.c_str()); }

int32_t dtype_of(const Tensor& tensor) {
  switch (tensor.element) {
    case Element::kFloat32:
      return WH_F32;
    case Element::kFloat16:
      return WH_F16;
    case Element::kBfloat16:
      return WH_BF16;
    default:
      fail_type(std::string(tensor.name) + " is " + tensor.dtype_text() +
                "; it must be float32, float16 or bfloat16");
  }
}

void expect_shape(const Tensor& tensor, std::initializer_list<int64_t> shape, const char* names) {
  if (tensor.ndim == static_cast<int>(shape.size()) &&
      std::equal(shape.begin(), shape.end(), tensor.shape.begin())) {
    return;
  }
  fail_value(std::string(tensor.name) + " is " + tensor.shape_text() + "; it must be " + names +
             ", here " + tensor.shape_text({shape.begin(), shape.size()}));
}

wh_limits Limits::with_threads(int32_t threads) const {
  wh_limits copy = limits;
  copy.kernel = kernel.empty() ? nullptr : kernel.c_str();
  if (copy.threads == 0) copy.threads = threads;
  return copy;
}

void check(wh_status status) {
  switch (status) {
    case WH_OK:
      return;
    case WH_INVALID_ARGUMENT:
      fail_value(wh_last_error());
    case WH_OUT_OF_MEMORY:
      PyErr_SetString(PyExc_MemoryError, wh_last_error());
      throw nb::python_error();
    default:
      throw std::runtime_error(wh_last_error());
  }
}

Call::Call(const Arguments& a)
    : q_object_(a.q),
      stream_(a.stream),
      access_(a.access),
      q_(a.q, "q", a.stream, a.access),
      k_(stored_of(a.k), "k", a.stream, a.access),
      v_(stored_of(a.v), "v", a.stream, a.access) {
  wh_problem_init(&problem_, sizeof(problem_));
  wh_tensors_init(&tensors_, sizeof(tensors_));
  const Layouts layouts = layouts_of(a.layouts);
  problem_.query_layout = layouts.query_offsets.is_none() ? WH_QUERIES_DENSE : WH_QUERIES_PACKED;
  problem_.key_layout = !layouts.page_table.is_none()    ? WH_KEYS_PAGED
                        : !layouts.key_offsets.is_none() ? WH_KEYS_PACKED
                                                         : WH_KEYS_DENSE;
  const bool is_packed_k = problem_.key_layout == WH_KEYS_PACKED;
  const KeyNames& names = kNamesKv[problem_.key_layout];
  read_as(q_, kNamesQ[problem_.query_layout], problem_.query_layout == WH_QUERIES_PACKED);
  read_as(k_, names.k, is_packed_k);
  read_as(v_, names.v, is_packed_k);
  if (is_quantised(a.k)) read_quantised(a.k, k_, problem_.quantised_k);
  if (is_quantised(a.v)) read_quantised(a.v, v_, problem_.quantised_v);
  if (q_.device_type != kDlCpu && !q_.on_cuda()) {
    fail_value("q is on " + q_.device_text() + "; it must be on the CPU or on a CUDA device");
  }
  problem_.batch = q_.shape[0];
  problem_.len_q = q_.shape[2];
  problem_.len_k = k_.shape[2];
  read_layouts(layouts, a);
  const int64_t key_batch = problem_.key_layout == WH_KEYS_DENSE ? problem_.batch : k_.shape[0];
  expect_shape(k_, {key_batch, k_.shape[1], k_.shape[2], q_.shape[3]}, names.k_with_q);
  expect_shape(v_, {key_batch, k_.shape[1], k_.shape[2], v_.shape[3]}, names.v_with_k);
  problem_.dtype_q = dtype_of(q_);
  const bool has_elements_k = problem_.quantised_k == WH_NOT_QUANTISED;
  const bool has_elements_v = problem_.quantised_v == WH_NOT_QUANTISED;
  problem_.dtype_kv = dtype_of(has_elements_k ? k_ : has_elements_v ? v_ : q_);
  if (has_elements_k && has_elements_v && dtype_of(v_) != problem_.dtype_kv) {
    fail_type(std::string("v is ") + v_.dtype_text() + "; it must be of k's type, " +
              k_.dtype_text());
  }
  expect_same_device(k_);
  expect_same_device(v_);
  problem_.device = q_.on_cuda() ? WH_CUDA : WH_CPU;
  problem_.device_index = q_.device_id;
  problem_.heads_q = q_.shape[1];
  problem_.heads_kv = k_.shape[1];
  problem_.dim_qk = q_.shape[3];
  problem_.dim_v = v_.shape[3];
  check(wh_problem_set_dense(&problem_));
  std::copy_n(q_.strides.begin(), 4, problem_.stride_q);
  std::copy_n(k_.strides.begin(), 4, problem_.stride_k);
  std::copy_n(v_.strides.begin(), 4, problem_.stride_v);
  if (page_table_.shape[1] > 0) problem_.stride_page_table = page_table_.stride;
  tensors_.q = q_.data;
  tensors_.k = k_.data;
  tensors_.v = v_.data;
  // v is a slice of k, as in absorbed latent attention: kernels that can read it once.
  if (has_elements_k && has_elements_v && v_.data == k_.data && v_.data != nullptr &&
      problem_.dim_v <= problem_.dim_qk &&
      std::equal(k_.strides.begin(), k_.strides.begin() + 4, v_.strides.begin())) {
    problem_.uses |= WH_USES_VALUES_IN_KEYS;
  }
  if (!has_elements_k) {
    read_scales(a.k, k_, scales_k_, problem_.scales_k, problem_.stride_scales_k, tensors_.scales_k);
  }
  if (!has_elements_v) {
    read_scales(a.v, v_, scales_v_, problem_.scales_v, problem_.stride_scales_v, tensors_.scales_v);
  }
  read_options(a);
  if (!a.mask.is_none()) read_mask(a.mask, problem_.len_q, problem_.len_k);
  if (!a.sinks.is_none()) read_sinks(a.sinks);
  if (a.return_log_sum_exp) problem_.uses |= WH_USES_LOG_SUM_EXP;
  if (!a.out.is_none()) read_out(a.out, Access::kWrite);
}

void Call::read_layouts(const Layouts& layouts, const Arguments& a) {
  const bool is_packed_q = problem_.query_layout == WH_QUERIES_PACKED;
  const bool is_packed_k = problem_.key_layout == WH_KEYS_PACKED;
  const bool is_paged = problem_.key_layout == WH_KEYS_PAGED;
  if (is_paged && !layouts.key_offsets.is_none()) {
    fail_value("key_offsets is given beside page_table; keys are packed or paged, not both");
  }
  if (!is_paged) expect_none("page_offsets", layouts.page_offsets, "page_table");
  if (!is_packed_q) expect_none("len_q", layouts.len_q, "query_offsets");
  if (!is_packed_k && !is_paged) expect_none("len_k", layouts.len_k, "key_offsets or page_table");
  if (is_paged && a.key_lengths.is_none()) {
    fail_value("key_lengths is None; page_table needs them, the keys of each sequence");
  }
  if (is_packed_q && !a.mask.is_none()) {
    fail_value("mask is given with query_offsets; it must be None where queries are packed");
  }
  if (is_packed_q) {
    problem_.total_q = q_.shape[2];
    read_integers("query_offsets", layouts.query_offsets, 1, {problem_.total_q, "q's tokens"},
                  query_offsets_);
    if (query_offsets_.shape[0] == 0) {
      fail_value("query_offsets is empty; it must be [batch + 1], from 0 on");
    }
    problem_.batch = query_offsets_.shape[0] - 1;
    tensors_.query_offsets = query_offsets_.data;
    problem_.len_q = longest("len_q", layouts.len_q, "query_offsets", host_data(query_offsets_),
                             problem_.batch + 1, true);
  }
  if (is_packed_k) {
    problem_.total_k = k_.shape[2];
    tensors_.key_offsets = read_offsets("key_offsets", layouts.key_offsets,
                                        {problem_.total_k, "k's tokens"}, key_offsets_);
    problem_.len_k = longest("len_k", layouts.len_k, "key_offsets", host_data(key_offsets_),
                             problem_.batch + 1, true);
  }
  // A list of pages is as long as key lengths say.
  const Range keys = is_paged ? Range{kMostLength, "2^31 - 1"} : Range{problem_.len_k, "len_k"};
  if (!a.key_lengths.is_none()) {
    tensors_.key_lengths = read_keys("key_lengths", a.key_lengths, keys, key_lengths_);
    problem_.uses |= WH_USES_KEY_LENGTHS;
  }
  if (!a.key_starts.is_none()) {
    tensors_.key_starts = read_keys("key_starts", a.key_starts, keys, key_starts_);
    problem_.uses |= WH_USES_KEY_STARTS;
  }
  if (is_paged) read_pages(layouts);
}

void Call::read_pages(const Layouts& layouts) {
  const bool has_offsets = !layouts.page_offsets.is_none();
  problem_.pages = k_.shape[0];
  problem_.page_size = k_.shape[2];
  read_integers("page_table", layouts.page_table, has_offsets ? 1 : 2,
                {problem_.pages - 1, "the last page", std::numeric_limits<int32_t>::min()},
                page_table_);
  tensors_.page_table = page_table_.data;
  if (has_offsets) {
    problem_.uses |= WH_USES_PAGE_OFFSETS;
    problem_.page_entries = page_table_.shape[0];
    tensors_.page_offsets =
        read_offsets("page_offsets", layouts.page_offsets,
                     {problem_.page_entries, "page_table's entries"}, page_offsets_);
    problem_.len_k = longest("len_k", layouts.len_k, "key_lengths", host_data(key_lengths_),
                             problem_.batch, false);
    return;
  }
  if (page_table_.shape[0] != problem_.batch) {
    fail_value("page_table has " + std::to_string(page_table_.shape[0]) +
               " rows; it must be [batch, pages of a sequence], of the batch's " +
               std::to_string(problem_.batch));
  }
  const int64_t held = page_table_.shape[1] * problem_.page_size;
  problem_.len_k = layouts.len_k.is_none() ? held : number<int64_t>("len_k", layouts.len_k);
  if (problem_.len_k > held) {
    fail_value("len_k is " + std::to_string(problem_.len_k) + "; it must be at most " +
               std::to_string(held) + ", what a row of page_table holds");
  }
}

void Call::read_quantised(nb::handle object, Tensor& codes, int32_t& format) {
  const nb::object given = object.attr("format");
  std::string name;
  if (!nb::try_cast(given, name)) {
    fail_type(std::string(codes.name) + " has the format " + text_of(given) +
              "; it must be \"e4m3\", \"int8\", \"q8_0\" or \"q4_0\"");
  }
  const auto* found = std::find_if(std::begin(kFormats), std::end(kFormats),
                                   [&](const Format& each) { return name == each.name; });
  if (found == std::end(kFormats)) {
    fail_value(std::string(codes.name) + " has the format \"" + name +
               "\"; it must be e4m3, int8, q8_0 or q4_0");
  }
  format = found->number;
  const bool is_byte = codes.element == Element::kUint8 ||
                       (codes.element == Element::kInt8 && format != WH_E4M3) ||
                       (codes.element == Element::kFloat8E4m3 && format == WH_E4M3);
  if (!is_byte || (format == WH_INT8 && codes.element != Element::kInt8)) {
    const char* valid = format == WH_INT8   ? "int8"
                        : format == WH_E4M3 ? "float8_e4m3fn or uint8"
                                            : "uint8";
    fail_type(std::string(codes.name) + " is " + codes.dtype_text() + "; codes of " + name +
              " must be " + valid);
  }
  if (found->block_elements == 1) return;
  // A row is blocks one after another, all of their bytes.
  bool is_whole = codes.shape[3] % found->block_bytes == 0 && codes.strides[3] == 1;
  for (size_t i = 0; i < 3; ++i) is_whole &= codes.strides[i] % found->block_bytes == 0;
  if (!is_whole) {
    fail_value(std::string(codes.name) + " is " + codes.shape_text() + "; rows of " + name +
               " must be blocks of " + std::to_string(found->block_bytes) +
               " bytes side by side, and their distances whole blocks");
  }
  const auto elements = [&](int64_t bytes) {
    return bytes / found->block_bytes * found->block_elements;
  };
  codes.shape[3] = elements(codes.shape[3]);
  for (size_t i = 0; i < 3; ++i) codes.strides[i] = elements(codes.strides[i]);
}

// What differs along the keys is of a token, along the columns of a channel.
void Call::read_scales(nb::handle object, const Tensor& codes, std::optional<Tensor>& scales,
                       int32_t& kind, int64_t (&strides)[4], const float*& data) {
  const nb::object array = object.attr("scales");
  if (array.is_none()) return;
  scales.emplace(array, "scales", stream_, access_);
  expect_same_device(*scales);
  if (scales->element != Element::kFloat32) {
    fail_type("scales of " + std::string(codes.name) + " are " + scales->dtype_text() +
              "; they must be float32");
  }
  const int ahead = 4 - scales->ndim;
  bool broadcasts = true;
  std::array<int64_t, 4> extents{1, 1, 1, 1};
  for (int i = 0; i < scales->ndim; ++i) {
    const auto to = static_cast<size_t>(ahead + i), from = static_cast<size_t>(i);
    extents[to] = scales->shape[from];
    strides[to] = extents[to] != 1 ? scales->strides[from] : 0;
  }
  if (problem_.key_layout == WH_KEYS_PACKED) {  // tokens before heads, as in the codes
    std::swap(extents[1], extents[2]);
    std::swap(strides[1], strides[2]);
    broadcasts &= scales->ndim < 4;
  }
  for (size_t i = 0; i < 4; ++i) broadcasts &= extents[i] == 1 || extents[i] == codes.shape[i];
  if (!broadcasts || (extents[2] != 1 && extents[3] != 1)) {
    fail_value("scales of " + std::string(codes.name) + " are " + scales->shape_text() +
               "; they must broadcast to " + kNamesKv[problem_.key_layout].scales);
  }
  kind = extents[3] != 1                      ? WH_SCALES_CHANNEL
         : extents[2] != 1                    ? WH_SCALES_TOKEN_HEAD
         : extents[1] != 1 || extents[0] != 1 ? WH_SCALES_HEAD
                                              : WH_SCALES_TENSOR;
  data = static_cast<const float*>(scales->data);
}

void Call::expect_same_device(const Tensor& tensor) const {
  if (tensor.device_type == q_.device_type && tensor.device_id == q_.device_id) return;
  fail_value(std::string(tensor.name) + " is on " + tensor.device_text() +
             "; it must be where q is, on " + q_.device_text());
}

void Call::read_options(const Arguments& a) {
  if (!a.scale.is_none()) problem_.scale = number<float>("scale", a.scale);
  if (!a.softcap.is_none()) problem_.softcap = number<float>("softcap", a.softcap);
  problem_.causal = causal_of(a.causal);
  if (a.window.is_none()) return;
  if (!nb::isinstance<nb::tuple>(a.window) || nb::len(a.window) != 2) {
    fail_value("window is " + text_of(a.window) + "; it must be a tuple (left, right) of keys");
  }
  problem_.window_left = window_side(a.window, a.window[0]);
  problem_.window_right = window_side(a.window, a.window[1]);
}

void Call::read_mask(nb::handle object, int64_t len_q, int64_t len_k) {
  mask_.emplace(object, "mask", stream_, access_);
  const Tensor& mask = *mask_;
  expect_same_device(mask);
  if (mask.element == Element::kBool) {
    problem_.mask = WH_MASK_BOOLEAN;
  } else if (mask.element == Element::kFloat32) {
    problem_.mask = WH_MASK_ADDITIVE_F32;
  } else if (mask.element == q_.element) {
    problem_.mask = WH_MASK_ADDITIVE;
  } else {
    fail_type(std::string("mask is ") + mask.dtype_text() +
              "; it must be bool (true attends), float32 or of q's type (added to the scores)");
  }
  const int64_t extents[] = {problem_.batch, problem_.heads_q, len_q, len_k};
  for (int i = 0; i < 4; ++i) {
    const int from = i - (4 - mask.ndim);
    const int64_t size = from < 0 ? 1 : mask.shape[from];
    if (size != extents[i] && size != 1) {
      fail_value("mask is " + mask.shape_text() +
                 "; it must broadcast to [batch, heads_q, len_q, len_k], here [" +
                 std::to_string(extents[0]) + ", " + std::to_string(extents[1]) + ", " +
                 std::to_string(extents[2]) + ", " + std::to_string(extents[3]) + "]");
    }
    problem_.stride_mask[i] = size == 1 ? 0 : mask.strides[from];
  }
  tensors_.mask = mask.data;
}

void Call::read_sinks(nb::handle object) {
  sinks_.emplace(object, "sinks", stream_, access_);
  expect_same_device(*sinks_);
  expect_shape(*sinks_, {problem_.heads_q}, "[heads_q]");
  if (sinks_->element != Element::kFloat32) {
    fail_type(std::string("sinks is ") + sinks_->dtype_text() + "; it must be float32");
  }
  if (problem_.heads_q > 1 && sinks_->strides[0] != 1) {
    fail_value("sinks has a stride of " + std::to_string(sinks_->strides[0]) +
               "; it must be contiguous");
  }
  problem_.uses |= WH_USES_SINKS;
  tensors_.sinks = static_cast<const float*>(sinks_->data);
}

void Call::read_integers(const char* name, nb::handle object, int ndim, const Range& range,
                         Integers& to) {
  const auto narrow = [&](int64_t value) {
    if (value < range.least || value > kMostLength) {
      fail_value(std::string(name) + " holds " + std::to_string(value) +
                 "; each must be between 0 and " + range.name + ", " + std::to_string(range.most));
    }
    to.copy.push_back(static_cast<int32_t>(value));
  };
  if (nb::isinstance<nb::list>(object) || nb::isinstance<nb::tuple>(object)) {
    if (q_.on_cuda() || ndim != 1)
      fail_value(std::string(name) + " is a list; it must be an int32 array" +
                 (ndim == 1 ? " on CUDA" : ""));
    for (const nb::handle item : object) narrow(number<int64_t>(name, item));
    to.shape[0] = static_cast<int64_t>(to.copy.size());
    to.data = to.copy.data();
    return;
  }
  const Tensor& tensor = to.tensor.emplace(object, name, stream_, access_);
  expect_same_device(tensor);
  if (tensor.ndim != ndim) {
    fail_value(std::string(name) + " is " + tensor.shape_text() + "; it must be " +
               (ndim == 1 ? "of one dimension" : "[batch, pages of a sequence]"));
  }
  const bool is_wide = tensor.element == Element::kInt64;
  if (tensor.element != Element::kInt32 && !(is_wide && !q_.on_cuda())) {
    fail_type(std::string(name) + " is " + tensor.dtype_text() + "; it must be int32");
  }
  std::copy_n(tensor.shape.begin(), ndim, to.shape.begin());
  const int64_t rows = ndim == 1 ? 1 : to.shape[0], columns = ndim == 1 ? to.shape[0] : to.shape[1];
  const int64_t step = tensor.strides[static_cast<size_t>(ndim - 1)];
  to.stride = ndim == 1 ? 0 : tensor.strides[0];
  to.data = static_cast<const int32_t*>(tensor.data);
  if (!is_wide && (columns <= 1 || step == 1)) return;
  if (q_.on_cuda()) fail_value(std::string(name) + " must be contiguous on CUDA");
  if (tensor.data == nullptr) return;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t at = row * to.stride + column * step;
      narrow(is_wide ? static_cast<const int64_t*>(tensor.data)[at]
                     : static_cast<const int32_t*>(tensor.data)[at]);
    }
  }
  to.stride = columns;
  to.data = to.copy.data();
}

const int32_t* Call::read_keys(const char* name, nb::handle object, const Range& range,
                               Integers& keys) {
  read_integers(name, object, 1, range, keys);
  expect_count(name, keys, problem_.batch, "[batch]");
  return keys.data;
}

const int32_t* Call::read_offsets(const char* name, nb::handle object, const Range& range,
                                  Integers& offsets) {
  read_integers(name, object, 1, range, offsets);
  expect_count(name, offsets, problem_.batch + 1, "[batch + 1]");
  return offsets.data;
}

void Call::expect_count(const char* name, const Integers& numbers, int64_t count,
                        const char* shape) const {
  if (numbers.shape[0] == count) return;
  fail_value(std::string(name) + " is [" + std::to_string(numbers.shape[0]) + "]; it must be " +
             shape + ", here [" + std::to_string(count) + "]");
}

void Call::read_out(nb::handle object, Access access) {
  out = nb::borrow(object);
  out_.emplace(object, "out", stream_, access);
  expect_same_device(*out_);
  const char* names = kNamesOut[problem_.query_layout];
  read_as(*out_, names, problem_.query_layout == WH_QUERIES_PACKED);
  expect_shape(*out_, {q_.shape[0], problem_.heads_q, q_.shape[2], problem_.dim_v}, names);
  if (out_->element != q_.element) {
    fail_type(std::string("out is ") + out_->dtype_text() + "; it must be of q's type, " +
              q_.dtype_text());
  }
  if (access == Access::kWrite && out_->is_read_only) {
    fail_value("out is read-only; it must be writable");
  }
  std::copy_n(out_->strides.begin(), 4, problem_.stride_out);
  tensors_.out = out_->data;
}

void Call::read_log_sum_exp(nb::handle object, Access access) {
  log_sum_exp = nb::borrow(object);
  log_sum_exp_.emplace(object, "log_sum_exp", stream_, access);
  expect_same_device(*log_sum_exp_);
  const char* names = kNamesLse[problem_.query_layout];
  if (problem_.query_layout == WH_QUERIES_PACKED) {
    expect_shape(*log_sum_exp_, {problem_.total_q, problem_.heads_q}, names);
  } else {
    expect_shape(*log_sum_exp_, {problem_.batch, problem_.heads_q, problem_.len_q}, names);
  }
  if (log_sum_exp_->element != Element::kFloat32) fail_type("log_sum_exp must be float32");
  tensors_.log_sum_exp = static_cast<float*>(log_sum_exp_->data);
}

void Call::allocate(nb::handle empty) {
  const wh_problem& p = problem_;
  const auto make = [&](const std::array<int64_t, 4>& shape, int ndim, Element element) {
    nb::object made = allocate_like(q_object_, q_, shape, ndim, element);
    if (made.is_valid()) return made;
    nb::list extents;
    for (int i = 0; i < ndim; ++i) extents.append(shape[static_cast<size_t>(i)]);
    return empty(q_object_, nb::tuple(extents), name_of(element));
  };
  const bool is_packed = p.query_layout == WH_QUERIES_PACKED;
  if (!out_) {
    read_out(is_packed ? make({p.total_q, p.heads_q, p.dim_v}, 3, q_.element)
                       : make({p.batch, p.heads_q, p.len_q, p.dim_v}, 4, q_.element),
             Access::kWrite);
  }
  if ((p.uses & WH_USES_LOG_SUM_EXP) != 0 && !log_sum_exp_) {
    read_log_sum_exp(is_packed ? make({p.total_q, p.heads_q}, 2, Element::kFloat32)
                               : make({p.batch, p.heads_q, p.len_q}, 3, Element::kFloat32),
                     Access::kWrite);
  }
}

void* Call::read_gradient(std::optional<Tensor>& gradient, nb::handle object, const char* name,
                          Access access, const Tensor& of, int64_t (&strides)[4]) {
  gradient.emplace(object, name, stream_, access);
  expect_same_device(*gradient);
  const bool is_of_keys = &of == &k_ || &of == &v_;
  const bool is_packed = is_of_keys ? problem_.key_layout == WH_KEYS_PACKED
                                    : problem_.query_layout == WH_QUERIES_PACKED;
  if (is_packed && gradient->ndim == 3) gradient->view_packed();
  if (gradient->ndim != 4 || gradient->element != of.element ||
      !std::equal(of.shape.begin(), of.shape.begin() + 4, gradient->shape.begin())) {
    fail_value(std::string(name) + " is " + gradient->dtype_text() + " " + gradient->shape_text() +
               "; it must be as " + of.name + ", " + of.dtype_text() + " " + of.shape_text());
  }
  std::copy_n(gradient->strides.begin(), 4, strides);
  return gradient->data;
}

void Call::turn_backward() {
  problem_.pass = WH_BACKWARD;
  // A v that is a slice of k has a gradient of its own here.
  problem_.uses &= ~static_cast<uint32_t>(WH_USES_VALUES_IN_KEYS);
}

void Call::read_gradients(const Gradients& g) {
  turn_backward();
  read_out(g.out, Access::kRead);
  read_log_sum_exp(g.log_sum_exp, Access::kRead);
  tensors_.d_out =
      read_gradient(d_out_, g.d_out, "d_out", Access::kRead, *out_, problem_.stride_d_out);
  tensors_.dq = read_gradient(dq_, g.dq, "dq", Access::kWrite, q_, problem_.stride_dq);
  tensors_.dk = read_gradient(dk_, g.dk, "dk", Access::kWrite, k_, problem_.stride_dk);
  tensors_.dv = read_gradient(dv_, g.dv, "dv", Access::kWrite, v_, problem_.stride_dv);
  if (g.d_sinks.is_none()) return;
  d_sinks_.emplace(g.d_sinks, "d_sinks", stream_, Access::kWrite);
  expect_same_device(*d_sinks_);
  expect_shape(*d_sinks_, {problem_.heads_q}, "[heads_q]");
  if (d_sinks_->element != Element::kFloat32) fail_type("d_sinks must be float32");
  tensors_.d_sinks = static_cast<float*>(d_sinks_->data);
}

void Call::write_into(wh_appended& appended) const {
  for (const Tensor* tensor : {&k_, &v_}) {
    if (tensor->is_read_only) {
      fail_value(std::string(tensor->name) + " is read-only; it must be writable");
    }
  }
  appended.k = k_.data;
  appended.v = v_.data;
  if (scales_k_) appended.scales_k = static_cast<float*>(scales_k_->data);
  if (scales_v_) appended.scales_v = static_cast<float*>(scales_v_->data);
}

wh_run_options Call::run_options() const { return run_options_of(q_, stream_); }

wh_run_options run_options_of(const Tensor& tensor, nb::handle stream) {
  wh_run_options options;
  wh_run_options_init(&options, sizeof(options));
  options.executor = executor();
  options.stream = tensor.stream;
  if (tensor.on_cuda() && !stream.is_none()) {
    options.stream = reinterpret_cast<void*>(number<uintptr_t>("stream", stream));
  }
  return options;
}

void Call::run(const wh_limits& limits) {
  wh_run_options options = run_options();
  Interrupt interrupt;
  if (!q_.on_cuda()) {
    options.progress = Interrupt::check;
    options.progress_context = &interrupt;
  }
  wh_status status = WH_OK;
  {
    const nb::gil_scoped_release release;
    status = wh_attention(&problem_, &limits, &tensors_, &options);
  }
  // Only a Python signal handler that raised cancels.
  if (status == WH_CANCELLED) throw nb::python_error();
  if (status == WH_REFUSED) {
    const std::string message = wh_last_error();
    wh_plan* plan = nullptr;
    wh_plan_create(&problem_, &limits, &plan);
    const char* json = plan == nullptr ? nullptr : wh_plan_json(plan);
    const nb::object refused = nb::module_::import_("widehead._errors").attr("Refused");
    const nb::object error = refused(message, json == nullptr ? "" : json);
    wh_plan_destroy(plan);
    PyErr_SetObject(refused.ptr(), error.ptr());
    throw nb::python_error();
  }
  check(status);
}

}  // namespace widehead_python
