// Widehead for C++20: views, options, plans and one call, header-only on top of the C ABI.
//
//   widehead::attention(q, k, v, out, {.causal = widehead::Causal::kBottomRight});
//
//   const auto plan = widehead::plan(widehead::problem(q, k, v, out, options), {});
//   std::cout << plan.explain();
//   plan.run(q, k, v, out);
//
//   widehead::backward(q, k, v, out, {d_out, dq, dk, dv}, options);
//
//   widehead::append(new_k, new_v, slots, k, v);   // into caches, of pages or dense
//
// Failures throw widehead::Error with the C API's status and message. Where memory is so short that
// not even that can be made, std::bad_alloc, as from any C++ code.
#pragma once

#include <widehead/widehead.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace widehead {

class Error : public std::runtime_error {
 public:
  Error(wh_status status, const std::string& message)
      : std::runtime_error(message), status_(status) {}
  wh_status status() const noexcept { return status_; }

 private:
  wh_status status_;
};

// Throws Error unless `status` is WH_OK.
inline void check(wh_status status) {
  if (status != WH_OK) throw Error(status, wh_last_error());
}

enum class Dtype : int32_t { kF32 = WH_F32, kF16 = WH_F16, kBf16 = WH_BF16 };
enum class Device : int32_t { kCpu = WH_CPU, kCuda = WH_CUDA };
enum class Causal : int32_t {
  kNone = WH_CAUSAL_NONE,
  kBottomRight = WH_CAUSAL_BOTTOM_RIGHT,
  kTopLeft = WH_CAUSAL_TOP_LEFT
};
enum class MaskKind : int32_t {
  kBoolean = WH_MASK_BOOLEAN,
  kAdditiveF32 = WH_MASK_ADDITIVE_F32,
  kAdditive = WH_MASK_ADDITIVE
};
enum class Policy : int32_t {
  kAutomatic = WH_AUTOMATIC,
  kFused = WH_FUSED,
  kFusedAbove = WH_FUSED_ABOVE
};
enum class Precision : int32_t { kNative = WH_NATIVE, kHigh = WH_HIGH };
// Keys and values of fewer bits; see enum wh_quantised.
enum class Quantised : int32_t {
  kNone = WH_NOT_QUANTISED,
  kE4m3 = WH_E4M3,
  kInt8 = WH_INT8,
  kQ8_0 = WH_Q8_0,
  kQ4_0 = WH_Q4_0
};
// What shares a scale; see enum wh_scales.
enum class Scales : int32_t {
  kNone = WH_SCALES_NONE,
  kTensor = WH_SCALES_TENSOR,
  kHead = WH_SCALES_HEAD,
  kTokenHead = WH_SCALES_TOKEN_HEAD,
  kChannel = WH_SCALES_CHANNEL
};

using Extents = std::array<int64_t, 4>;

// "[1, 8, 16, 256]": for messages.
inline std::string to_string(const Extents& e) {
  return "[" + std::to_string(e[0]) + ", " + std::to_string(e[1]) + ", " + std::to_string(e[2]) +
         ", " + std::to_string(e[3]) + "]";
}

inline std::string to_string(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
      return "f32";
    case Dtype::kF16:
      return "f16";
    case Dtype::kBf16:
      return "bf16";
  }
  return "of the unknown type " + std::to_string(static_cast<int32_t>(dtype));
}

// Strides of a contiguous tensor, in elements.
constexpr Extents dense_strides(const Extents& shape) {
  return {shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1};
}

// f32 scales of codes, strides in elements; those of what shares one may be anything.
struct ScalesView {
  const float* data = nullptr;
  Scales kind = Scales::kNone;
  Extents strides{};
};

// A tensor that somebody else owns: [batch, heads, length, dim], strides in elements. Keys and
// values may be codes of a format, in blocks of 32 elements too:
//
//   TensorView k(codes, Quantised::kInt8, {1, 8, 4096, 128},
//                {scales, Scales::kTokenHead, dense_strides({1, 8, 4096, 1})});
struct TensorView {
  void* data = nullptr;
  Dtype dtype = Dtype::kF32;  // where it is not quantised
  Extents shape{};
  Extents strides{};
  Quantised quantised = Quantised::kNone;
  ScalesView scales{};

  TensorView() = default;
  TensorView(const void* tensor, Dtype type, const Extents& extents)
      : TensorView(tensor, type, extents, dense_strides(extents)) {}
  TensorView(const void* tensor, Dtype type, const Extents& extents, const Extents& steps)
      : data(const_cast<void*>(tensor)), dtype(type), shape(extents), strides(steps) {}
  TensorView(const void* codes, Quantised format, const Extents& extents, ScalesView of = {})
      : TensorView(codes, format, extents, dense_strides(extents), of) {}
  TensorView(const void* codes, Quantised format, const Extents& extents, const Extents& steps,
             ScalesView of)
      : data(const_cast<void*>(codes)),
        shape(extents),
        strides(steps),
        quantised(format),
        scales(of) {}

  bool is_quantised() const { return quantised != Quantised::kNone; }
};

// Tokens of all sequences one after another, [tokens, heads, dim]: q and out of packed queries, k
// and v of packed keys, rows to append.
inline TensorView packed(const void* data, Dtype dtype, int64_t tokens, int64_t heads,
                         int64_t dim) {
  return {data, dtype, {1, heads, tokens, dim}, {tokens * heads * dim, dim, heads * dim, 1}};
}
// A pool of pages, [pages, page_size, heads, dim]. One of heads before tokens is a dense tensor of
// {pages, heads, page_size, dim}; where K and V share an allocation the strides say so.
inline TensorView paged(const void* data, Dtype dtype, int64_t pages, int64_t page_size,
                        int64_t heads, int64_t dim) {
  return {
      data, dtype, {pages, heads, page_size, dim}, {page_size * heads * dim, dim, heads * dim, 1}};
}

// Sequences of lengths of their own: what no view says. Counts are the most that a run has; see
// docs/serving.md.
struct Sequences {
  int64_t batch = 1;
  int64_t len_q = 0, len_k = 0;            // of one sequence
  const int32_t* query_offsets = nullptr;  // [batch + 1]: q and out are packed()
  const int32_t* key_offsets = nullptr;    // [batch + 1]: k and v are packed()
  const int32_t* page_table = nullptr;     // [batch, ceil(len_k / page_size)]: k and v are paged()
  const int32_t* page_offsets = nullptr;   // [batch + 1]: the table is one list
  int64_t page_entries = 0;                // of that list
};

// [batch, heads_q, len_q, len_k]; a stride of 0 broadcasts.
struct MaskView {
  const void* data = nullptr;
  MaskKind kind = MaskKind::kBoolean;
  Extents strides{};
};

// What to compute beyond softmax(scale * q k^T) v.
struct Options {
  std::optional<float> scale{};  // default 1 / sqrt(dim_qk)
  float softcap = 0;             // 0: none
  Causal causal = Causal::kNone;
  int64_t window_left = WH_UNLIMITED;
  int64_t window_right = WH_UNLIMITED;
  std::optional<MaskView> mask{};
  const float* sinks = nullptr;          // [heads_q]
  const int32_t* key_lengths = nullptr;  // [batch]
  const int32_t* key_starts = nullptr;   // [batch]
  float* log_sum_exp = nullptr;          // [batch, heads_q, len_q], written; backward reads it
  bool values_in_keys = false;           // v is the first columns of k: the same data and strides
  std::optional<Sequences> sequences{};  // packed and paged tensors
  Device device = Device::kCpu;
  int32_t device_index = 0;
};

// What the caller allows.
struct Limits {
  uint64_t workspace_bytes = WH_NO_BYTE_LIMIT;
  Policy policy = Policy::kAutomatic;
  int64_t fused_above = 16384;
  std::string kernel{};  // forces one by name
  int32_t threads = 0;   // 0: every core
  Precision precision = Precision::kNative;
  double longest_step_us = 0;  // between two looks at the progress callback; 0: any
  bool batch_invariant = false;
  int64_t fresh_keys = -1;  // a promise for CUDA streams; see wh_limits

  bool operator==(const Limits&) const = default;

  wh_limits c_limits() const {
    wh_limits limits;
    check(wh_limits_init(&limits, sizeof(limits)));
    limits.workspace_bytes = workspace_bytes;
    limits.policy = static_cast<int32_t>(policy);
    limits.fused_above = fused_above;
    limits.kernel = kernel.empty() ? nullptr : kernel.c_str();
    limits.threads = threads;
    limits.precision = static_cast<int32_t>(precision);
    limits.longest_step_us = longest_step_us;
    limits.batch_invariant = batch_invariant;
    limits.fresh_keys = fresh_keys;
    return limits;
  }
};

// The shapes that a problem's q and its keys are stored in.
inline Extents query_shape(const wh_problem& p) {
  if (p.query_layout == WH_QUERIES_PACKED) return {1, p.heads_q, p.total_q, p.dim_qk};
  return {p.batch, p.heads_q, p.len_q, p.dim_qk};
}
inline Extents key_shape(const wh_problem& p) {
  if (p.key_layout == WH_KEYS_PACKED) return {1, p.heads_kv, p.total_k, p.dim_qk};
  if (p.key_layout == WH_KEYS_PAGED) return {p.pages, p.heads_kv, p.page_size, p.dim_qk};
  return {p.batch, p.heads_kv, p.len_k, p.dim_qk};
}
inline Extents with_columns(Extents shape, int64_t dim) {
  shape[3] = dim;
  return shape;
}

// The problem that these tensors and options are. Throws Error when the shapes disagree.
inline wh_problem problem(const TensorView& q, const TensorView& k, const TensorView& v,
                          const TensorView& out, const Options& options = {}) {
  wh_problem problem;
  check(wh_problem_init(&problem, sizeof(problem)));
  problem.heads_q = q.shape[1];
  problem.heads_kv = k.shape[1];
  problem.dim_qk = q.shape[3];
  problem.dim_v = v.shape[3];
  if (!options.sequences) {
    problem.batch = q.shape[0];
    problem.len_q = q.shape[2];
    problem.len_k = k.shape[2];
  } else {
    const Sequences& all = *options.sequences;
    problem.batch = all.batch;
    problem.len_q = all.len_q;
    problem.len_k = all.len_k;
    if (all.query_offsets != nullptr) {
      problem.query_layout = WH_QUERIES_PACKED;
      problem.total_q = q.shape[2];
    }
    if (all.key_offsets != nullptr) {
      problem.key_layout = WH_KEYS_PACKED;
      problem.total_k = k.shape[2];
    }
    if (all.page_table != nullptr) {
      problem.key_layout = WH_KEYS_PAGED;
      problem.pages = k.shape[0];
      problem.page_size = k.shape[2];
      problem.page_entries = all.page_entries;
      if (all.page_offsets != nullptr) {
        problem.uses |= WH_USES_PAGE_OFFSETS;
      } else if (problem.page_size > 0) {
        problem.stride_page_table = (all.len_k + problem.page_size - 1) / problem.page_size;
      }
    }
  }
  const auto expect = [](const char* name, const Extents& shape, const Extents& expected) {
    if (shape == expected) return;
    throw Error(WH_INVALID_ARGUMENT, std::string(name) + " is " + to_string(shape) +
                                         "; the others make it " + to_string(expected));
  };
  expect("q", q.shape, query_shape(problem));
  expect("k", k.shape, key_shape(problem));
  expect("v", v.shape, with_columns(key_shape(problem), problem.dim_v));
  expect("out", out.shape, with_columns(query_shape(problem), problem.dim_v));
  if (out.dtype != q.dtype && out.dtype != Dtype::kF32) {
    throw Error(WH_INVALID_ARGUMENT, "out is " + to_string(out.dtype) +
                                         "; it must have the type of q, " + to_string(q.dtype) +
                                         ", or be f32");
  }
  if (q.is_quantised() || out.is_quantised()) {
    throw Error(WH_INVALID_ARGUMENT, "q and out must not be quantised");
  }
  if (v.dtype != k.dtype && !k.is_quantised() && !v.is_quantised()) {
    throw Error(WH_INVALID_ARGUMENT, "v is " + to_string(v.dtype) +
                                         "; it must have the type of k, " + to_string(k.dtype));
  }
  problem.device = static_cast<int32_t>(options.device);
  problem.device_index = options.device_index;
  problem.dtype_q = static_cast<int32_t>(q.dtype);
  problem.dtype_kv = static_cast<int32_t>(k.is_quantised() ? v.dtype : k.dtype);
  const auto set = [](int64_t(&to)[4], const Extents& from) {
    for (size_t i = 0; i < 4; ++i) to[i] = from[i];
  };
  set(problem.stride_q, q.strides);
  set(problem.stride_k, k.strides);
  set(problem.stride_v, v.strides);
  set(problem.stride_out, out.strides);
  problem.quantised_k = static_cast<int32_t>(k.quantised);
  problem.quantised_v = static_cast<int32_t>(v.quantised);
  problem.scales_k = static_cast<int32_t>(k.scales.kind);
  problem.scales_v = static_cast<int32_t>(v.scales.kind);
  set(problem.stride_scales_k, k.scales.strides);
  set(problem.stride_scales_v, v.scales.strides);
  problem.scale = options.scale.value_or(1.0f / std::sqrt(static_cast<float>(problem.dim_qk)));
  problem.softcap = options.softcap;
  problem.causal = static_cast<int32_t>(options.causal);
  problem.window_left = options.window_left;
  problem.window_right = options.window_right;
  if (options.mask) {
    problem.mask = static_cast<int32_t>(options.mask->kind);
    set(problem.stride_mask, options.mask->strides);
  }
  if (options.sinks != nullptr) problem.uses |= WH_USES_SINKS;
  if (options.key_lengths != nullptr) problem.uses |= WH_USES_KEY_LENGTHS;
  if (options.key_starts != nullptr) problem.uses |= WH_USES_KEY_STARTS;
  if (options.log_sum_exp != nullptr) problem.uses |= WH_USES_LOG_SUM_EXP;
  if (options.values_in_keys) problem.uses |= WH_USES_VALUES_IN_KEYS;
  if (out.dtype != q.dtype) problem.uses |= WH_USES_F32_OUT;
  return problem;
}

// The pointers of one run. The workspace, at least plan.workspace_bytes() and aligned to
// WH_WORKSPACE_ALIGNMENT, is the caller's to add.
inline wh_tensors tensors(const TensorView& q, const TensorView& k, const TensorView& v,
                          const TensorView& out, const Options& options = {}) {
  wh_tensors tensors;
  check(wh_tensors_init(&tensors, sizeof(tensors)));
  tensors.q = q.data;
  tensors.k = k.data;
  tensors.v = v.data;
  tensors.out = out.data;
  tensors.scales_k = k.scales.data;
  tensors.scales_v = options.values_in_keys ? nullptr : v.scales.data;
  tensors.mask = options.mask ? options.mask->data : nullptr;
  tensors.sinks = options.sinks;
  tensors.key_lengths = options.key_lengths;
  tensors.key_starts = options.key_starts;
  tensors.log_sum_exp = options.log_sum_exp;
  if (!options.sequences) return tensors;
  tensors.query_offsets = options.sequences->query_offsets;
  tensors.key_offsets = options.sequences->key_offsets;
  tensors.page_table = options.sequences->page_table;
  tensors.page_offsets = options.sequences->page_offsets;
  return tensors;
}

// Of the backward pass: the gradient of out, and where those of q, k, v and the sinks go.
struct Gradients {
  TensorView d_out, dq, dk, dv;
  float* d_sinks = nullptr;  // [heads_q]
};

// The backward pass of the same tensors and options. Throws Error when the shapes disagree.
inline wh_problem problem(const TensorView& q, const TensorView& k, const TensorView& v,
                          const TensorView& out, const Gradients& gradients,
                          const Options& options = {}) {
  wh_problem backward = problem(q, k, v, out, options);
  backward.pass = WH_BACKWARD;
  const auto take = [](const char* name, const TensorView& gradient, const TensorView& of,
                       int64_t(&strides)[4]) {
    if (gradient.shape != of.shape || gradient.dtype != of.dtype) {
      throw Error(WH_INVALID_ARGUMENT, std::string(name) + " is " + to_string(gradient.shape) +
                                           "; it must have the shape and type of its tensor, " +
                                           to_string(of.shape));
    }
    for (size_t i = 0; i < 4; ++i) strides[i] = gradient.strides[i];
  };
  take("d_out", gradients.d_out, out, backward.stride_d_out);
  take("dq", gradients.dq, q, backward.stride_dq);
  take("dk", gradients.dk, k, backward.stride_dk);
  if (!options.values_in_keys) take("dv", gradients.dv, v, backward.stride_dv);
  return backward;
}

inline wh_tensors tensors(const TensorView& q, const TensorView& k, const TensorView& v,
                          const TensorView& out, const Gradients& gradients,
                          const Options& options = {}) {
  wh_tensors backward = tensors(q, k, v, out, options);
  backward.d_out = gradients.d_out.data;
  backward.dq = gradients.dq.data;
  backward.dk = gradients.dk.data;
  backward.dv = gradients.dv.data;
  backward.d_sinks = gradients.d_sinks;
  return backward;
}

// Where a run gets its threads or its stream from.
struct RunOptions {
  void* stream = nullptr;                                         // a cudaStream_t
  const wh_executor* executor = nullptr;                          // null: oneTBB
  int32_t (*progress)(void* context, double fraction) = nullptr;  // anything but 0 cancels
  void* progress_context = nullptr;

  wh_run_options c_options() const {
    wh_run_options options;
    check(wh_run_options_init(&options, sizeof(options)));
    options.stream = stream;
    options.executor = executor;
    options.progress = progress;
    options.progress_context = progress_context;
    return options;
  }
};

// What a run may need beside its four tensors: what the plan's problem uses, and the workspace.
struct Extras {
  const void* mask = nullptr;
  const float* sinks = nullptr;          // [heads_q]
  const int32_t* key_lengths = nullptr;  // [batch]
  const int32_t* key_starts = nullptr;   // [batch]
  float* log_sum_exp = nullptr;          // [batch, heads_q, len_q], written
  // Of packed and paged tensors: the pointers of it. The counts are the plan's.
  Sequences sequences{};
  // At least the plan's bytes, aligned to WH_WORKSPACE_ALIGNMENT. Null: on the CPU memory for the
  // time of the call; CUDA plans need one.
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
};

// A plan: immutable, movable, runnable from any number of threads at once.
class Plan {
 public:
  Plan(const wh_problem& problem, const Limits& limits) {
    const wh_limits c_limits = limits.c_limits();
    wh_plan* plan = nullptr;
    const wh_status status = wh_plan_create(&problem, &c_limits, &plan);
    plan_.reset(plan);  // a refused plan can still be explained, but not here: it throws
    check(status);
    read_problem();
  }
  static Plan from_json(std::string_view text) {
    wh_plan* plan = nullptr;
    check(wh_plan_from_json(text.data(), text.size(), &plan));
    return Plan(plan);
  }

  const wh_problem& problem() const { return problem_; }
  std::string kernel() const { return wh_plan_kernel(plan_.get()); }
  uint64_t workspace_bytes() const { return wh_plan_workspace_bytes(plan_.get()); }
  double estimated_us() const { return wh_plan_estimated_us(plan_.get()); }
  // Every candidate with its verdict, reason, workspace and estimate.
  std::string explain() const { return text(wh_plan_explain(plan_.get())); }
  std::string json() const { return text(wh_plan_json(plan_.get())); }

  // The tensors must have the types, shapes and strides that the plan was made for. CPU: done when
  // it returns. CUDA: on the stream.
  void run(const wh_tensors& tensors, const RunOptions& options = {}) const {
    const wh_run_options c_options = options.c_options();
    check(wh_plan_run(plan_.get(), &tensors, &c_options));
  }

  // The same from views, which must be those of the plan's problem: throws Error when a type, shape
  // or stride differs.
  void run(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out,
           const Extras& extras = {}, const RunOptions& options = {}) const {
    const wh_problem& p = problem_;
    const int32_t dtype_out = (p.uses & WH_USES_F32_OUT) != 0 ? int32_t{WH_F32} : p.dtype_q;
    const StoredAs k_as{p.dtype_kv, p.quantised_k}, v_as{p.dtype_kv, p.quantised_v};
    expect("q", q, {p.dtype_q}, query_shape(p), p.stride_q);
    expect("k", k, k_as, key_shape(p), p.stride_k);
    expect("v", v, v_as, with_columns(key_shape(p), p.dim_v), p.stride_v);
    expect("out", out, {dtype_out}, with_columns(query_shape(p), p.dim_v), p.stride_out);
    expect_scales("k", k, p.scales_k, p.stride_scales_k);
    expect_scales("v", v, p.scales_v, p.stride_scales_v);
    wh_tensors t = tensors(q, k, v, out, {.sequences = extras.sequences});
    if ((p.uses & WH_USES_VALUES_IN_KEYS) != 0) t.scales_v = nullptr;
    t.mask = extras.mask;
    t.sinks = extras.sinks;
    t.key_lengths = extras.key_lengths;
    t.key_starts = extras.key_starts;
    t.log_sum_exp = extras.log_sum_exp;
    t.workspace = extras.workspace;
    t.workspace_bytes = extras.workspace_bytes;
    std::unique_ptr<void, FreeWorkspace> owned;
    if (t.workspace == nullptr && p.device == WH_CPU) {
      t.workspace_bytes = static_cast<size_t>(workspace_bytes());
      owned.reset(::operator new (t.workspace_bytes, std::align_val_t{WH_WORKSPACE_ALIGNMENT},
                                  std::nothrow));
      if (owned == nullptr) {
        throw Error(WH_OUT_OF_MEMORY,
                    "no memory for " + std::to_string(t.workspace_bytes) + " bytes of workspace");
      }
      t.workspace = owned.get();
    }
    run(t, options);
  }

 private:
  explicit Plan(wh_plan* plan) : plan_(plan) { read_problem(); }
  void read_problem() {
    check(wh_problem_init(&problem_, sizeof(problem_)));
    check(wh_plan_problem(plan_.get(), &problem_));
  }
  static std::string text(const char* made) {
    if (made == nullptr) throw Error(WH_OUT_OF_MEMORY, wh_last_error());
    return made;
  }
  struct StoredAs {
    int32_t dtype, quantised = WH_NOT_QUANTISED;
  };
  static void expect(const std::string& name, const TensorView& view, StoredAs as,
                     const Extents& shape, const int64_t (&planned)[4]) {
    const bool is_of_type = view.is_quantised() || static_cast<int32_t>(view.dtype) == as.dtype;
    if (static_cast<int32_t>(view.quantised) != as.quantised || !is_of_type) {
      throw Error(WH_INVALID_ARGUMENT, name + " has another type than the plan was made for");
    }
    if (view.shape != shape) {
      throw Error(WH_INVALID_ARGUMENT, name + " is " + to_string(view.shape) +
                                           "; the plan was made for " + to_string(shape));
    }
    expect_strides(name + " has", view.strides, shape, planned);
  }
  // [batch, heads_kv, keys, columns], 1 where they share one. Those of tokens lie as keys do.
  Extents scales_shape(const TensorView& view) const {
    switch (view.scales.kind) {
      case Scales::kNone:
      case Scales::kTensor:
        break;
      case Scales::kHead:
        return {problem_.batch, problem_.heads_kv, 1, 1};
      case Scales::kTokenHead:
        return {view.shape[0], view.shape[1], view.shape[2], 1};
      case Scales::kChannel:
        return {problem_.batch, problem_.heads_kv, 1, view.shape[3]};
    }
    return {1, 1, 1, 1};
  }
  void expect_scales(const std::string& name, const TensorView& view, int32_t kind,
                     const int64_t (&planned)[4]) const {
    if (static_cast<int32_t>(view.scales.kind) != kind) {
      throw Error(WH_INVALID_ARGUMENT,
                  "scales of " + name + " are of another kind than the plan was made for");
    }
    expect_strides("scales of " + name + " have", view.scales.strides, scales_shape(view), planned);
  }
  static void expect_strides(const std::string& has, const Extents& have, const Extents& shape,
                             const int64_t (&planned)[4]) {
    const Extents strides{planned[0], planned[1], planned[2], planned[3]};
    for (size_t i = 0; i < 4; ++i) {
      if (shape[i] <= 1 || have[i] == strides[i]) continue;
      throw Error(WH_INVALID_ARGUMENT, has + " strides " + to_string(have) +
                                           "; the plan was made for " + to_string(strides));
    }
  }
  struct FreeWorkspace {
    void operator()(void* workspace) const noexcept {
      ::operator delete (workspace, std::align_val_t{WH_WORKSPACE_ALIGNMENT});
    }
  };
  struct Destroy {
    void operator()(wh_plan* plan) const noexcept { wh_plan_destroy(plan); }
  };
  std::unique_ptr<wh_plan, Destroy> plan_;
  wh_problem problem_{};
};

inline Plan plan(const wh_problem& problem, const Limits& limits = {}) {
  return Plan(problem, limits);
}

// Plans (cached), allocates the workspace for the time of the call, and runs.
inline void attention(const TensorView& q, const TensorView& k, const TensorView& v,
                      const TensorView& out, const Options& options = {}, const Limits& limits = {},
                      const RunOptions& run = {}) {
  const wh_problem c_problem = problem(q, k, v, out, options);
  const wh_limits c_limits = limits.c_limits();
  const wh_tensors c_tensors = tensors(q, k, v, out, options);
  const wh_run_options c_options = run.c_options();
  check(wh_attention(&c_problem, &c_limits, &c_tensors, &c_options));
}

// The same for the gradients. out and options.log_sum_exp hold what attention() wrote.
inline void backward(const TensorView& q, const TensorView& k, const TensorView& v,
                     const TensorView& out, const Gradients& gradients, const Options& options = {},
                     const Limits& limits = {}, const RunOptions& run = {}) {
  const wh_problem c_problem = problem(q, k, v, out, gradients, options);
  const wh_limits c_limits = limits.c_limits();
  const wh_tensors c_tensors = tensors(q, k, v, out, gradients, options);
  const wh_run_options c_options = run.c_options();
  check(wh_attention(&c_problem, &c_limits, &c_tensors, &c_options));
}

// Writes rows [1, heads, tokens, dim], as packed() makes them, into caches by slots; see
// wh_append(). A cache [n, heads, length, dim] has n * length slots: of pages that paged() makes,
// page * length + row. Without a v of its own (data null) values lie in keys. Into codes rows are
// rounded, and scales of tokens written; those of heads and channels are of a dense cache's batch
// entries, or with a stride of 0 of all pages.
inline void append(const TensorView& new_k, const TensorView& new_v, std::span<const int64_t> slots,
                   const TensorView& k, const TensorView& v, const RunOptions& run = {},
                   Device device = Device::kCpu, int32_t device_index = 0) {
  const bool has_v = v.data != nullptr;
  const TensorView& values = has_v ? v : k;
  const auto tokens = static_cast<int64_t>(slots.size());
  const Dtype dtype = k.is_quantised() ? values.dtype : k.dtype;
  const auto expect = [&](const char* name, const TensorView& rows, const TensorView& cache) {
    const Extents expected{1, cache.shape[1], tokens, cache.shape[3]};
    const bool is_of_type = cache.is_quantised() || cache.dtype == dtype;
    if (rows.shape == expected && rows.dtype == new_k.dtype && !rows.is_quantised() && is_of_type) {
      return;
    }
    throw Error(WH_INVALID_ARGUMENT,
                std::string(name) + " is " + to_string(rows.shape) +
                    (rows.is_quantised() ? " of codes" : "") + "; slots and cache make it " +
                    to_string(expected) +
                    ", with one type for both new ones and one for both caches");
  };
  expect("new_k", new_k, k);
  if (has_v) expect("new_v", new_v, v);
  if (!std::equal(k.shape.begin(), k.shape.end() - 1, values.shape.begin())) {
    throw Error(WH_INVALID_ARGUMENT, "v is " + to_string(v.shape) + "; k is " + to_string(k.shape) +
                                         ": all but the last must be the same");
  }
  wh_problem cache;
  check(wh_problem_init(&cache, sizeof(cache)));
  cache.device = static_cast<int32_t>(device);
  cache.device_index = device_index;
  cache.dtype_q = cache.dtype_kv = static_cast<int32_t>(dtype);
  cache.heads_q = cache.heads_kv = k.shape[1];
  cache.dim_qk = k.shape[3];
  cache.dim_v = values.shape[3];
  cache.batch = k.shape[0];
  cache.len_k = k.shape[2];
  if (!has_v) cache.uses |= WH_USES_VALUES_IN_KEYS;
  cache.quantised_k = static_cast<int32_t>(k.quantised);
  cache.quantised_v = static_cast<int32_t>(values.quantised);
  cache.scales_k = static_cast<int32_t>(k.scales.kind);
  cache.scales_v = static_cast<int32_t>(values.scales.kind);
  wh_appended appended;
  check(wh_appended_init(&appended, sizeof(appended)));
  appended.tokens = tokens;
  appended.dtype = static_cast<int32_t>(new_k.dtype);
  appended.slots = slots.data();
  appended.new_k = new_k.data;
  appended.new_v = new_v.data;
  appended.k = k.data;
  appended.v = v.data;
  // Written where tokens have scales of their own, by whom has made the view: as elements are.
  appended.scales_k = const_cast<float*>(k.scales.data);
  appended.scales_v = has_v ? const_cast<float*>(v.scales.data) : nullptr;
  for (size_t i = 0; i < 4; ++i) cache.stride_k[i] = k.strides[i];
  for (size_t i = 0; i < 4; ++i) cache.stride_v[i] = values.strides[i];
  for (size_t i = 0; i < 4; ++i) cache.stride_scales_k[i] = k.scales.strides[i];
  for (size_t i = 0; i < 4; ++i) cache.stride_scales_v[i] = values.scales.strides[i];
  constexpr size_t kOrder[] = {2, 1, 3};  // token, head, element
  for (size_t i = 0; i < 3; ++i) appended.stride_new_k[i] = new_k.strides[kOrder[i]];
  for (size_t i = 0; i < 3; ++i) appended.stride_new_v[i] = new_v.strides[kOrder[i]];
  const wh_run_options c_options = run.c_options();
  check(wh_append(&cache, &appended, &c_options));
}

// Attention over a part of the keys; log_sum_exp [batch, heads_q, len_q], contiguous.
struct Partial {
  TensorView out;
  float* log_sum_exp = nullptr;
};

// Attention over all keys from that over parts of them; see wh_merge(). `merged` may be one of the
// parts; without a log-sum-exp there, none is written.
inline void merge(const Partial& merged, std::span<const Partial> parts,
                  const float* sinks = nullptr, const RunOptions& run = {},
                  Device device = Device::kCpu, int32_t device_index = 0) {
  const auto set = [](int64_t(&to)[4], int64_t(&lse)[3], const TensorView& out) {
    for (size_t i = 0; i < 4; ++i) to[i] = out.strides[i];
    lse[0] = out.shape[1] * out.shape[2];
    lse[1] = out.shape[2];
    lse[2] = 1;
  };
  std::vector<wh_partial> c_parts(parts.size());
  for (size_t i = 0; i < parts.size(); ++i) {
    const TensorView& out = parts[i].out;
    if (out.shape != merged.out.shape) {
      throw Error(WH_INVALID_ARGUMENT, "parts[" + std::to_string(i) + "] is " +
                                           to_string(out.shape) + "; merged is " +
                                           to_string(merged.out.shape));
    }
    c_parts[i].out = out.data;
    c_parts[i].log_sum_exp = parts[i].log_sum_exp;
    c_parts[i].dtype = static_cast<int32_t>(out.dtype);
    set(c_parts[i].stride_out, c_parts[i].stride_log_sum_exp, out);
  }
  wh_merged c_merged;
  check(wh_merged_init(&c_merged, sizeof(c_merged)));
  c_merged.dtype = static_cast<int32_t>(merged.out.dtype);
  c_merged.batch = merged.out.shape[0];
  c_merged.heads_q = merged.out.shape[1];
  c_merged.len_q = merged.out.shape[2];
  c_merged.dim_v = merged.out.shape[3];
  c_merged.out = merged.out.data;
  c_merged.log_sum_exp = merged.log_sum_exp;
  c_merged.sinks = sinks;
  c_merged.device = static_cast<int32_t>(device);
  c_merged.device_index = device_index;
  set(c_merged.stride_out, c_merged.stride_log_sum_exp, merged.out);
  const wh_run_options c_options = run.c_options();
  check(wh_merge(&c_merged, c_parts.data(), c_parts.size(), &c_options));
}

}  // namespace widehead
