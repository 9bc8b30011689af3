// The C ABI over the core, and the only catch-all.
#include "widehead/widehead.h"

#include <fmt/format.h>

#include <cmath>
#include <mutex>

#include "api/append.h"
#include "api/c_structs.h"
#include "api/guarded.h"
#include "api/machine.h"
#include "api/merge.h"
#include "api/plan_log.h"
#include "api/run.h"
#include "core/json_writer.h"
#include "core/names.h"
#include "core/problem_fields.h"
#include "plan/explain.h"
#include "plan/plan_json.h"

struct wh_plan {
  explicit wh_plan(wh::Plan p) : plan(std::move(p)) {}

  wh::Plan plan;
  // Made on demand: planning takes microseconds, printing takes longer.
  mutable std::mutex mutex;
  mutable std::string explanation, json;
};

namespace wh {
namespace {

// Null past the last one, and for a number that is no device.
const Kernel* kernel_at(int32_t device, size_t index) {
  const auto kind = kDevices.value(int64_t{device});
  if (!kind) return nullptr;
  for (const Kernel* kernel : kernels_of(*kind)) {
    if (kernel->pass == Pass::kForward && index-- == 0) return kernel;
  }
  return nullptr;
}

// Set by failures only, so that a hot loop of good calls never touches it. The fallback needs no
// memory.
thread_local std::string last_error;
thread_local const char* last_error_text = "";

}  // namespace

wh_status fail(wh_status status, std::string message) noexcept {
  last_error = std::move(message);
  last_error_text = last_error.c_str();
  return status;
}

wh_status fail_with_text(wh_status status, const char* text) noexcept {
  last_error_text = text;
  return status;
}

wh_status fail_with(const std::exception& error) noexcept {
  last_error_text = "internal error";
  try {
    return fail(WH_INTERNAL_ERROR, fmt::format("internal error: {}", error.what()));
  } catch (...) {
    return WH_INTERNAL_ERROR;
  }
}

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
wh_status wh_merged_init(wh_merged* merged, size_t size) {
  return guarded([&] { return wh::init_sized(wh::kMergedStruct, merged, size); });
}
wh_status wh_appended_init(wh_appended* appended, size_t size) {
  return guarded([&] { return wh::init_sized(wh::kAppendedStruct, appended, size); });
}

wh_status wh_problem_set_dense(wh_problem* problem) {
  return guarded([&]() -> Status {
    wh_problem p{};
    WH_RETURN_IF_ERROR(wh::read_sized(wh::problem_struct(), problem, p));
    WH_RETURN_IF_ERROR(wh::check_extents(p));
    const auto copy = [](const wh::Strides& from, int64_t(&to)[4]) {
      std::copy(from.begin(), from.end(), to);
    };
    const auto set = [&](int64_t(&stride)[4], int64_t heads, int64_t length, int64_t dim) {
      copy(wh::dense_strides(heads, length, dim), stride);
    };
    wh::Problem layout;
    if (Status status = wh::read_layout(p, layout); !status.ok()) return status;
    wh::set_dense(layout);
    copy(layout.stride_q, problem->stride_q);
    copy(layout.stride_k, problem->stride_k);
    copy(layout.stride_v, problem->stride_v);
    copy(layout.stride_out, problem->stride_out);
    if (problem->size >= offsetof(wh_problem, query_layout)) {
      problem->stride_page_table = layout.stride_page_table;
    }
    set(problem->stride_mask, p.heads_q, p.len_q, p.len_k);
    if (problem->size >= offsetof(wh_problem, pass)) {
      copy(layout.stride_out, problem->stride_d_out);
      copy(layout.stride_q, problem->stride_dq);
      copy(layout.stride_k, problem->stride_dk);
      wh::Problem apart = layout;  // where v lies in k there is no dv
      apart.values_in_keys = false;
      wh::set_dense(apart);
      copy(apart.stride_v, problem->stride_dv);
    }
    if (problem->size >= offsetof(wh_problem, stride_scales_v) + sizeof(p.stride_scales_v)) {
      copy(layout.stride_scales_k, problem->stride_scales_k);
      copy(layout.stride_scales_v, problem->stride_scales_v);
    }
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
    if (Status status = wh::read_limits(limits, p, l); !status.ok()) return status;
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
    if (Status status = wh::read_limits(limits, p, l); !status.ok()) return status;
    if (Status status = wh::read_tensors(tensors, t); !status.ok()) return status;
    if (Status status = wh::read_run_options(options, o); !status.ok()) return status;
    const auto plan = wh::cached_plan(p, l);
    if (!plan.ok()) return plan.status();
    if (t.workspace != nullptr) return wh::run_plan(**plan, t, o);
    wh::Result<wh::Workspace> workspace =
        wh::Workspace::allocate({p.device, {p.device_index, o.stream}}, (*plan)->workspace_bytes);
    if (!workspace.ok()) return workspace.status();
    return wh::run_plan(**plan, t, o, &*workspace);
  });
}

wh_status wh_merge(const wh_merged* merged, const wh_partial* parts, size_t count,
                   const wh_run_options* options) {
  return guarded([&]() -> Status {
    wh_merged m{};
    wh::RunOptions o;
    WH_RETURN_IF_ERROR(wh::read_sized(wh::kMergedStruct, merged, m));
    WH_RETURN_IF_ERROR(wh::read_run_options(options, o));
    if (parts == nullptr && count > 0) {
      return wh::invalid(fmt::format("parts is null; count says that there are {}", count));
    }
    return wh::merge(m, {parts, count}, o);
  });
}

wh_status wh_append(const wh_problem* cache, const wh_appended* appended,
                    const wh_run_options* options) {
  return guarded([&]() -> Status {
    wh_appended a{};
    wh::Problem p;
    wh::RunOptions o;
    WH_RETURN_IF_ERROR(wh::read_problem(cache, p));
    WH_RETURN_IF_ERROR(wh::read_sized(wh::kAppendedStruct, appended, a));
    WH_RETURN_IF_ERROR(wh::read_run_options(options, o));
    return wh::append(p, a, o);
  });
}

const char* wh_kernel_name(int32_t device, size_t index) {
  const wh::Kernel* kernel = wh::kernel_at(device, index);
  return kernel == nullptr ? nullptr : kernel->name;
}

const char* wh_kernel_summary(int32_t device, size_t index) {
  const wh::Kernel* kernel = wh::kernel_at(device, index);
  return kernel == nullptr ? nullptr : kernel->summary;
}

const char* wh_device_json(int32_t device, int32_t device_index) {
  static thread_local std::string text;
  const wh_status status = guarded([&]() -> Status {
    const auto kind = wh::kDevices.value(int64_t{device});
    if (!kind) {
      return wh::invalid(fmt::format("device is {}; it must be between 0 and {}: {}", device,
                                     std::size(wh::kDevices.names) - 1, wh::kDevices.list()));
    }
    const wh::Backend& backend = wh::backend(*kind);
    if (const std::string& reason = backend.facts(device_index).unavailable; !reason.empty()) {
      return {wh::Code::kRefused, reason};
    }
    wh::JsonWriter json(wh::JsonWriter::Layout::kLine);
    json.begin_object();
    backend.write_facts(device_index, json);
    json.end_object();
    text = json.take();
    return {};
  });
  return status == WH_OK ? text.c_str() : nullptr;
}
