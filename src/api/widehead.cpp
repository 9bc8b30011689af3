// The C ABI over the core: conversion, validation, and the only catch-all.
#include "widehead/widehead.h"

#include <fmt/format.h>

#include <cmath>
#include <cstring>
#include <mutex>
#include <new>

#include "api/environment.h"
#include "api/machine.h"
#include "api/plan_cache.h"
#include "api/plan_log.h"
#include "api/sized_struct.h"
#include "api/workspace.h"
#include "core/json_writer.h"
#include "cuda/device.h"

struct wh_plan {
  explicit wh_plan(wh::Plan p) : plan(std::move(p)) {}

  wh::Plan plan;
  // Made on demand: planning takes microseconds, printing takes longer.
  mutable std::mutex mutex;
  mutable std::string explanation, json;
};

namespace wh {
namespace {

// Set by failures only, so that a hot loop of good calls never touches it. The fallback needs no
// memory.
thread_local std::string last_error;
thread_local const char* last_error_text = "";

wh_status fail(wh_status status, std::string message) noexcept {
  last_error = std::move(message);
  last_error_text = last_error.c_str();
  return status;
}

wh_status code_of(const Status& status) {
  switch (status.code()) {
    case Code::kOk:
      return WH_OK;
    case Code::kInvalidArgument:
      return WH_INVALID_ARGUMENT;
    case Code::kRefused:
      return WH_REFUSED;
    case Code::kOutOfMemory:
      return WH_OUT_OF_MEMORY;
    case Code::kDeviceError:
      return WH_DEVICE_ERROR;
    case Code::kCancelled:
      return WH_CANCELLED;
    case Code::kInternal:
      break;
  }
  return WH_INTERNAL_ERROR;
}

// Needs no memory: a refusal must not turn into another failure after its plan has been handed out.
wh_status answer(Status status) {
  return status.ok() ? WH_OK : fail(code_of(status), std::move(status).message());
}

// Runs body, which answers with a Status; nothing leaves it as an exception.
template <typename Body>
wh_status guarded(Body&& body) noexcept {
  try {
    return answer(body());
  } catch (const std::bad_alloc&) {
    last_error_text = "out of memory";
    return WH_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    last_error_text = "internal error";
    try {
      return fail(WH_INTERNAL_ERROR, fmt::format("internal error: {}", error.what()));
    } catch (...) {
      return WH_INTERNAL_ERROR;
    }
  } catch (...) {
    last_error_text = "internal error: an exception of an unknown type";
    return WH_INTERNAL_ERROR;
  }
}

// Sizes are those of 0.1.0 on a 64-bit system.
const SizedStruct<wh_problem>& problem_struct() {
  static const SizedStruct<wh_problem> sized = [] {
    wh_problem defaults{};
    defaults.batch = 1;
    defaults.heads_q = defaults.heads_kv = 1;
    defaults.window_left = defaults.window_right = WH_UNLIMITED;
    return SizedStruct<wh_problem>{"problem", 280, defaults};
  }();
  return sized;
}

const SizedStruct<wh_limits>& limits_struct() {
  static const SizedStruct<wh_limits> sized = [] {
    const Limits core;
    wh_limits defaults{};
    defaults.workspace_bytes = core.workspace_bytes;
    defaults.fused_above = core.fused_above;
    defaults.fresh_keys = core.fresh_keys;
    return SizedStruct<wh_limits>{"limits", 72, defaults};
  }();
  return sized;
}

constexpr SizedStruct<wh_tensors> kTensorsStruct{"tensors", 96, {}};
constexpr SizedStruct<wh_run_options> kRunOptionsStruct{"run_options", 40, {}};
static_assert(sizeof(wh_problem) >= 280 && sizeof(wh_limits) >= 72 &&
              sizeof(wh_tensors) >= kTensorsStruct.first_bytes &&
              sizeof(wh_run_options) >= kRunOptionsStruct.first_bytes);

template <typename Enum>
Status read_enum(const char* name, int32_t value, int32_t last, Enum& to) {
  if (value < 0 || value > last) {
    return invalid(fmt::format("{} is {}; it must be between 0 and {}", name, value, last));
  }
  to = static_cast<Enum>(value);
  return {};
}

Status read_problem(const wh_problem* from, Problem& to) {
  wh_problem c{};
  WH_RETURN_IF_ERROR(read_sized(problem_struct(), from, c));
  WH_RETURN_IF_ERROR(read_enum("device", c.device, WH_CUDA, to.device));
  WH_RETURN_IF_ERROR(read_enum("dtype_q", c.dtype_q, WH_BF16, to.dtype_q));
  WH_RETURN_IF_ERROR(read_enum("dtype_kv", c.dtype_kv, WH_BF16, to.dtype_kv));
  WH_RETURN_IF_ERROR(read_enum("causal", c.causal, WH_CAUSAL_TOP_LEFT, to.causal));
  WH_RETURN_IF_ERROR(read_enum("mask", c.mask, WH_MASK_ADDITIVE, to.mask));
  constexpr uint32_t kKnown = WH_USES_SINKS | WH_USES_KEY_LENGTHS | WH_USES_KEY_STARTS |
                              WH_USES_LOG_SUM_EXP | WH_USES_VALUES_IN_KEYS;
  if ((c.uses & ~kKnown) != 0) {
    return invalid(fmt::format("uses is {:#x}; valid: combinations of {:#x}", c.uses, kKnown));
  }
  to.device_index = c.device_index;
  to.batch = c.batch;
  to.heads_q = c.heads_q;
  to.heads_kv = c.heads_kv;
  to.len_q = c.len_q;
  to.len_k = c.len_k;
  to.dim_qk = c.dim_qk;
  to.dim_v = c.dim_v;
  std::copy_n(c.stride_q, 4, to.stride_q.begin());
  std::copy_n(c.stride_k, 4, to.stride_k.begin());
  std::copy_n(c.stride_v, 4, to.stride_v.begin());
  std::copy_n(c.stride_out, 4, to.stride_out.begin());
  // Without a mask its strides mean nothing, and must not make two equal problems differ.
  if (to.mask != MaskKind::kNone) std::copy_n(c.stride_mask, 4, to.stride_mask.begin());
  to.scale = c.scale;
  to.softcap = c.softcap;
  to.window_left = c.window_left;
  to.window_right = c.window_right;
  to.has_sinks = (c.uses & WH_USES_SINKS) != 0;
  to.has_key_lengths = (c.uses & WH_USES_KEY_LENGTHS) != 0;
  to.has_key_starts = (c.uses & WH_USES_KEY_STARTS) != 0;
  to.wants_log_sum_exp = (c.uses & WH_USES_LOG_SUM_EXP) != 0;
  to.values_in_keys = (c.uses & WH_USES_VALUES_IN_KEYS) != 0;
  return validate(to);
}

// The other way: what a caller would have written.
wh_problem problem_of(const Problem& p) {
  wh_problem c{};
  c.device = static_cast<int32_t>(p.device);
  c.device_index = p.device_index;
  c.dtype_q = static_cast<int32_t>(p.dtype_q);
  c.dtype_kv = static_cast<int32_t>(p.dtype_kv);
  c.batch = p.batch;
  c.heads_q = p.heads_q;
  c.heads_kv = p.heads_kv;
  c.len_q = p.len_q;
  c.len_k = p.len_k;
  c.dim_qk = p.dim_qk;
  c.dim_v = p.dim_v;
  std::copy_n(p.stride_q.begin(), 4, c.stride_q);
  std::copy_n(p.stride_k.begin(), 4, c.stride_k);
  std::copy_n(p.stride_v.begin(), 4, c.stride_v);
  std::copy_n(p.stride_out.begin(), 4, c.stride_out);
  std::copy_n(p.stride_mask.begin(), 4, c.stride_mask);
  c.scale = p.scale;
  c.softcap = p.softcap;
  c.causal = static_cast<int32_t>(p.causal);
  c.mask = static_cast<int32_t>(p.mask);
  c.window_left = p.window_left;
  c.window_right = p.window_right;
  if (p.has_sinks) c.uses |= WH_USES_SINKS;
  if (p.has_key_lengths) c.uses |= WH_USES_KEY_LENGTHS;
  if (p.has_key_starts) c.uses |= WH_USES_KEY_STARTS;
  if (p.wants_log_sum_exp) c.uses |= WH_USES_LOG_SUM_EXP;
  return c;
}

Status read_limits(const wh_limits* from, Device device, Limits& to) {
  if (from != nullptr) {
    wh_limits c{};
    WH_RETURN_IF_ERROR(read_sized(limits_struct(), from, c));
    WH_RETURN_IF_ERROR(read_enum("limits.policy", c.policy, WH_FUSED_ABOVE, to.policy));
    WH_RETURN_IF_ERROR(read_enum("limits.precision", c.precision, WH_HIGH, to.precision));
    WH_RETURN_IF_ERROR(
        read_enum("limits.batch_invariant", c.batch_invariant, 1, to.batch_invariant));
    to.workspace_bytes = c.workspace_bytes;
    to.longest_step_us = c.longest_step_us;
    to.fused_above = c.fused_above;
    to.threads = c.threads;
    to.fresh_keys = c.fresh_keys;
    if (c.kernel != nullptr) to.kernel = c.kernel;
  }
  return apply(environment(), device, to);
}

Status read_tensors(const wh_tensors* from, Tensors& to) {
  wh_tensors c{};
  WH_RETURN_IF_ERROR(read_sized(kTensorsStruct, from, c));
  to = {c.q,           c.k,          c.v,           c.out,       c.mask,           c.sinks,
        c.key_lengths, c.key_starts, c.log_sum_exp, c.workspace, c.workspace_bytes};
  return {};
}

struct RunOptions {
  Executor executor = default_executor();
  void* stream = nullptr;
  Progress::Callback progress = nullptr;
  void* progress_context = nullptr;
};

Status read_run_options(const wh_run_options* from, RunOptions& to) {
  if (from == nullptr) return {};
  wh_run_options c{};
  WH_RETURN_IF_ERROR(read_sized(kRunOptionsStruct, from, c));
  to.stream = c.stream;
  to.progress = c.progress;
  to.progress_context = c.progress_context;
  if (c.executor != nullptr) {
    if (c.executor->parallel == nullptr) {
      return invalid("run_options.executor.parallel is null; it must run count tasks");
    }
    to.executor = {c.executor->parallel, c.executor->context};
  }
  return {};
}

Result<Plan> plan_here(const Problem& problem, const Limits& limits) {
  Result<Plan> plan =
      make_plan(problem, limits, this_machine(problem.device, problem.device_index));
  if (plan.ok()) log_plan(*plan);
  return plan;
}

// The tensors' optional pointers follow the problem: what it does not use is not read.
Tensors used_tensors(const Problem& p, Tensors t) {
  if (p.mask == MaskKind::kNone) t.mask = nullptr;
  if (!p.has_sinks) t.sinks = nullptr;
  if (!p.has_key_lengths) t.key_lengths = nullptr;
  if (!p.has_key_starts) t.key_starts = nullptr;
  if (!p.wants_log_sum_exp) t.log_sum_exp = nullptr;
  return t;
}

Status check_workspace(const Plan& plan, const Tensors& t) {
  if (plan.workspace_bytes == 0) return {};
  if (t.workspace == nullptr) {
    return invalid(fmt::format("workspace is null; the plan takes {} bytes", plan.workspace_bytes));
  }
  if (t.workspace_bytes < plan.workspace_bytes) {
    return invalid(fmt::format("workspace_bytes is {}; the plan takes {}", t.workspace_bytes,
                               plan.workspace_bytes));
  }
  if (reinterpret_cast<uintptr_t>(t.workspace) % WH_WORKSPACE_ALIGNMENT != 0) {
    return invalid(fmt::format("workspace is {}; it must be aligned to {} bytes", t.workspace,
                               WH_WORKSPACE_ALIGNMENT));
  }
  return {};
}

// Without a workspace of the caller's, `own` is one that was allocated for this call.
Status run_plan(const Plan& plan, const Tensors& tensors, const RunOptions& options,
                const Workspace* own = nullptr) {
  WH_RETURN_IF_ERROR(runnable_status(plan));
  Tensors used = used_tensors(plan.problem, tensors);
  if (own != nullptr) {
    used.workspace = own->data();
    used.workspace_bytes = plan.workspace_bytes;
  }
  WH_RETURN_IF_ERROR(check_workspace(plan, used));
  used.workspace_bytes = plan.workspace_bytes;  // more may be there, and hold something else
  if (plan.workspace_bytes == 0) used.workspace = nullptr;  // wherever it points
  WH_RETURN_IF_ERROR(validate(plan.problem, used));
  const Problem& p = plan.problem;
  if (p.batch == 0 || p.len_q == 0) return {};
  if (p.device == Device::kCuda) {
    WH_RETURN_IF_ERROR(cuda::check_stream(p, options.stream));
    Tensors callers = used;
    // While a stream is captured, what is allocated on it is no memory yet, and looks like the
    // host's.
    if (own != nullptr) callers.workspace = nullptr;
    WH_RETURN_IF_ERROR(cuda::check_pointers(p, callers));
  }
  Progress progress(options.progress, options.progress_context);
  return run_kernel(plan.kernel,
                    {p, plan.config, used, options.executor, progress, options.stream});
}

PlanCache& plan_cache() {
  static PlanCache cache;
  return cache;
}

Result<std::shared_ptr<const Plan>> cached_plan(const Problem& problem, const Limits& limits) {
  if (auto cached = plan_cache().find(problem, limits)) return cached;
  Result<Plan> made = plan_here(problem, limits);
  if (!made.ok()) return made.status();
  WH_RETURN_IF_ERROR(runnable_status(*made));
  auto plan = std::make_shared<const Plan>(std::move(*made));
  plan_cache().insert(plan);
  return plan;
}

}  // namespace
}  // namespace wh

using wh::guarded;
using wh::Status;

const char* wh_last_error(void) { return wh::last_error_text; }

void wh_set_plan_log(void (*log)(void* context, const char* line), void* context) {
  // Nothing to answer with: a failure leaves its message in wh_last_error().
  (void)guarded([&]() -> Status {
    wh::set_plan_log(log, context);
    return {};
  });
}

wh_status wh_problem_init(wh_problem* problem, size_t size) {
  return guarded([&] { return wh::init_sized(wh::problem_struct(), problem, size); });
}
wh_status wh_limits_init(wh_limits* limits, size_t size) {
  return guarded([&] { return wh::init_sized(wh::limits_struct(), limits, size); });
}
wh_status wh_tensors_init(wh_tensors* tensors, size_t size) {
  return guarded([&] { return wh::init_sized(wh::kTensorsStruct, tensors, size); });
}
wh_status wh_run_options_init(wh_run_options* options, size_t size) {
  return guarded([&] { return wh::init_sized(wh::kRunOptionsStruct, options, size); });
}

wh_status wh_problem_set_dense(wh_problem* problem) {
  return guarded([&]() -> Status {
    wh_problem p{};
    WH_RETURN_IF_ERROR(wh::read_sized(wh::problem_struct(), problem, p));
    for (const int64_t size : {p.batch, p.heads_q, p.heads_kv, p.len_q, p.len_k}) {
      if (size < 0 || size > wh::kMaxLength) {
        return wh::invalid(fmt::format("a size of the problem is {}; it must be between 0 and {}",
                                       size, wh::kMaxLength));
      }
    }
    for (const int64_t dim : {p.dim_qk, p.dim_v}) {
      if (dim < 1 || dim > wh::kMaxDim) {
        return wh::invalid(
            fmt::format("a head dimension is {}; it must be between 1 and {}", dim, wh::kMaxDim));
      }
    }
    const auto set = [](int64_t(&stride)[4], int64_t heads, int64_t length, int64_t dim) {
      const wh::Strides dense = wh::dense_strides(heads, length, dim);
      std::copy(dense.begin(), dense.end(), stride);
    };
    set(problem->stride_q, p.heads_q, p.len_q, p.dim_qk);
    set(problem->stride_k, p.heads_kv, p.len_k, p.dim_qk);
    const bool values_in_keys = (p.uses & WH_USES_VALUES_IN_KEYS) != 0;
    set(problem->stride_v, p.heads_kv, p.len_k, values_in_keys ? p.dim_qk : p.dim_v);
    set(problem->stride_out, p.heads_q, p.len_q, p.dim_v);
    set(problem->stride_mask, p.heads_q, p.len_q, p.len_k);
    problem->scale = 1.0f / std::sqrt(static_cast<float>(p.dim_qk));
    return {};
  });
}

wh_status wh_plan_create(const wh_problem* problem, const wh_limits* limits, wh_plan** plan) {
  return guarded([&]() -> Status {
    if (plan == nullptr) return wh::invalid("plan is null; it must point to where the plan goes");
    *plan = nullptr;
    wh::Problem p;
    wh::Limits l;
    if (Status status = wh::read_problem(problem, p); !status.ok()) return status;
    if (Status status = wh::read_limits(limits, p.device, l); !status.ok()) return status;
    wh::Result<wh::Plan> made = wh::plan_here(p, l);
    if (!made.ok()) return made.status();
    Status status = wh::runnable_status(*made);
    *plan = new wh_plan(std::move(*made));
    return status;
  });
}

void wh_plan_destroy(wh_plan* plan) { delete plan; }

wh_status wh_plan_run(const wh_plan* plan, const wh_tensors* tensors,
                      const wh_run_options* options) {
  return guarded([&]() -> Status {
    if (plan == nullptr) return wh::invalid("plan is null");
    wh::Tensors t;
    wh::RunOptions o;
    if (Status status = wh::read_tensors(tensors, t); !status.ok()) return status;
    if (Status status = wh::read_run_options(options, o); !status.ok()) return status;
    return wh::run_plan(plan->plan, t, o);
  });
}

const char* wh_plan_kernel(const wh_plan* plan) {
  return plan == nullptr ? "" : plan->plan.kernel.c_str();
}
uint64_t wh_plan_workspace_bytes(const wh_plan* plan) {
  return plan == nullptr ? 0 : plan->plan.workspace_bytes;
}
double wh_plan_estimated_us(const wh_plan* plan) {
  return plan == nullptr ? 0 : plan->plan.estimated_us;
}

wh_status wh_plan_problem(const wh_plan* plan, wh_problem* problem) {
  return guarded([&]() -> Status {
    if (plan == nullptr) return wh::invalid("plan is null");
    return wh::write_sized(wh::problem_struct(), wh::problem_of(plan->plan.problem), problem);
  });
}

const char* wh_plan_explain(const wh_plan* plan) {
  const char* text = nullptr;
  (void)guarded([&]() -> Status {
    if (plan == nullptr) return wh::invalid("plan is null");
    const std::lock_guard lock(plan->mutex);
    if (plan->explanation.empty()) plan->explanation = wh::explain(plan->plan);
    text = plan->explanation.c_str();
    return {};
  });
  return text;
}

const char* wh_plan_json(const wh_plan* plan) {
  const char* text = nullptr;
  (void)guarded([&]() -> Status {
    if (plan == nullptr) return wh::invalid("plan is null");
    const std::lock_guard lock(plan->mutex);
    if (plan->json.empty()) plan->json = wh::to_json(plan->plan);
    text = plan->json.c_str();
    return {};
  });
  return text;
}

wh_status wh_plan_from_json(const char* text, size_t length, wh_plan** plan) {
  return guarded([&]() -> Status {
    if (plan == nullptr) return wh::invalid("plan is null; it must point to where the plan goes");
    *plan = nullptr;
    if (text == nullptr) return wh::invalid("text is null");
    wh::Result<wh::Plan> read = wh::plan_from_json(std::string(text, length), wh::this_machine);
    if (!read.ok()) return read.status();
    *plan = new wh_plan(std::move(*read));
    return {};
  });
}

wh_status wh_attention(const wh_problem* problem, const wh_limits* limits,
                       const wh_tensors* tensors, const wh_run_options* options) {
  return guarded([&]() -> Status {
    wh::Problem p;
    wh::Limits l;
    wh::Tensors t;
    wh::RunOptions o;
    if (Status status = wh::read_problem(problem, p); !status.ok()) return status;
    if (Status status = wh::read_limits(limits, p.device, l); !status.ok()) return status;
    if (Status status = wh::read_tensors(tensors, t); !status.ok()) return status;
    if (Status status = wh::read_run_options(options, o); !status.ok()) return status;
    const auto plan = wh::cached_plan(p, l);
    if (!plan.ok()) return plan.status();
    if (t.workspace != nullptr) return wh::run_plan(**plan, t, o);
    wh::Result<wh::Workspace> workspace =
        wh::Workspace::allocate({p.device, p.device_index, o.stream}, (*plan)->workspace_bytes);
    if (!workspace.ok()) return workspace.status();
    return wh::run_plan(**plan, t, o, &*workspace);
  });
}

const char* wh_kernel_name(int32_t device, size_t index) {
  if (device != WH_CPU && device != WH_CUDA) return nullptr;
  const auto kernels = wh::kernels_of(static_cast<wh::Device>(device));
  return index < kernels.size() ? kernels[index]->name : nullptr;
}

const char* wh_kernel_summary(int32_t device, size_t index) {
  if (device != WH_CPU && device != WH_CUDA) return nullptr;
  const auto kernels = wh::kernels_of(static_cast<wh::Device>(device));
  return index < kernels.size() ? kernels[index]->summary : nullptr;
}

const char* wh_device_json(int32_t device, int32_t device_index) {
  static thread_local std::string text;
  const wh_status status = guarded([&]() -> Status {
    wh::JsonWriter json(wh::JsonWriter::Layout::kLine);
    if (device == WH_CPU) {
      const wh::CpuFacts& cpu = wh::cpu_facts();
      json.begin_object();
      json.write("name", cpu.name);
      json.write("isa", cpu.isa);
      json.write("avx512_bf16", cpu.has_avx512_bf16);
      json.write("cores", cpu.cores);
      json.write("l2_bytes", cpu.l2_bytes);
      json.write("gflops_per_core", cpu.gflops_per_core);
      json.write("read_gbytes_per_s", cpu.read_gbytes_per_s);
      json.end_object();
      text = json.take();
      return {};
    }
    if (device != WH_CUDA) {
      return wh::invalid(fmt::format("device is {}; it must be 0 (CPU) or 1 (CUDA)", device));
    }
    const wh::CudaFacts& cuda = wh::cuda_facts(device_index);
    if (!cuda.unavailable.empty()) return {wh::Code::kRefused, cuda.unavailable};
    json.begin_object();
    json.write("name", cuda.name);
    json.write("index", cuda.index);
    json.write("compute_capability", cuda.compute_capability);
    json.write("sms", cuda.sms);
    json.write("shared_bytes", cuda.shared_bytes);
    json.write("l2_bytes", cuda.l2_bytes);
    json.write("tensor_tflops", cuda.tensor_tflops);
    json.write("read_gbytes_per_s", cuda.read_gbytes_per_s);
    json.end_object();
    text = json.take();
    return {};
  });
  return status == WH_OK ? text.c_str() : nullptr;
}
