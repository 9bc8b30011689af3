// Attention on dense tensors, held as f32 whatever type the kernel takes, for tests of relations
// between runs.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "api/machine.h"
#include "core/float16.h"
#include "plan/plan.h"

namespace wh {

inline bool is_bf16_kernel(const std::string& kernel) { return kernel == "cpu_prefill_bf16"; }

inline std::vector<Bfloat16> narrow(const std::vector<float>& from) {
  std::vector<Bfloat16> to;
  for (const float value : from) to.push_back(from_float<Bfloat16>(value));
  return to;
}

struct Attention {
  Problem problem;
  Limits limits;
  std::vector<float> q, k, v, out, lse;  // the last two hold NaN until a run writes them
  std::vector<float> mask;               // [len_q, len_k], additive; of q's type, or f32
  std::vector<int32_t> key_lengths;
  Dtype dtype = Dtype::kF32;  // kF32 or kBf16
  Plan plan;                  // of the last run

  Attention(int64_t heads_q, int64_t heads_kv, int64_t len_q, int64_t len_k, int64_t dim,
            int64_t batch = 1) {
    problem.batch = batch;
    problem.heads_q = heads_q;
    problem.heads_kv = heads_kv;
    problem.len_q = len_q;
    problem.len_k = len_k;
    problem.dim_qk = problem.dim_v = dim;
    problem.scale = 1 / std::sqrt(static_cast<float>(dim));
    problem.wants_log_sum_exp = true;
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& to, int64_t count) {
      to.resize(static_cast<size_t>(count));
      for (float& value : to) value = normal(random);
    };
    fill(q, batch * heads_q * len_q * dim);
    fill(k, batch * heads_kv * len_k * dim);
    fill(v, batch * heads_kv * len_k * dim);
  }

  void run(const std::string& kernel, const Executor& executor = default_executor()) {
    Progress unwatched;
    const Status status = run_watched(kernel, unwatched, executor);
    ASSERT_TRUE(status.ok()) << status.message();
  }

  Status run_watched(const std::string& kernel, Progress& progress,
                     const Executor& executor = default_executor()) {
    constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
    Problem& p = problem;
    p.stride_q = dense_strides(p.heads_q, p.len_q, p.dim_qk);
    p.stride_k = dense_strides(p.heads_kv, p.len_k, p.dim_qk);
    p.stride_v = dense_strides(p.heads_kv, p.len_k, p.dim_v);
    p.stride_out = dense_strides(p.heads_q, p.len_q, p.dim_v);
    p.has_key_lengths = !key_lengths.empty();
    out.assign(static_cast<size_t>(p.batch * p.heads_q * p.len_q * p.dim_v), kNan);
    lse.assign(static_cast<size_t>(p.batch * p.heads_q * p.len_q), kNan);
    limits.kernel = kernel;
    if (is_bf16_kernel(kernel)) dtype = Dtype::kBf16;
    const bool is_bf16 = dtype == Dtype::kBf16;
    p.dtype_q = p.dtype_kv = dtype;
    if (!mask.empty()) {
      if (p.mask == MaskKind::kNone) p.mask = MaskKind::kAdditiveQ;
      p.stride_mask = {0, 0, p.len_k, 1};
    }
    std::vector<Bfloat16> q_bf16, k_bf16, v_bf16, out_bf16, mask_bf16;
    if (is_bf16) {
      mask_bf16 = narrow(mask);
      q_bf16 = narrow(q);
      k_bf16 = narrow(k);
      v_bf16 = narrow(v);
      out_bf16 = narrow(out);
    }
    Result<Plan> made = make_plan(p, limits, this_machine(Device::kCpu, 0));
    if (!made.ok()) return made.status();
    if (Status status = runnable_status(*made); !status.ok()) return status;
    plan = std::move(*made);
    std::vector<std::byte> workspace(plan.workspace_bytes + 64);
    Tensors t;
    const auto data = [&](auto& f32, auto& bf16) {
      return is_bf16 ? static_cast<void*>(bf16.data()) : static_cast<void*>(f32.data());
    };
    t.q = data(q, q_bf16);
    t.k = data(k, k_bf16);
    t.v = data(v, v_bf16);
    t.out = data(out, out_bf16);
    if (p.mask == MaskKind::kAdditiveF32) t.mask = mask.data();
    if (p.mask == MaskKind::kAdditiveQ) t.mask = data(mask, mask_bf16);
    t.log_sum_exp = lse.data();
    t.key_lengths = key_lengths.empty() ? nullptr : key_lengths.data();
    t.workspace =
        reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64);
    t.workspace_bytes = plan.workspace_bytes;
    Status status = find_kernel(kernels_of(Device::kCpu), plan.kernel)
                        ->run({plan.problem, plan.config, t, executor, progress});
    for (size_t i = 0; i < out_bf16.size(); ++i) out[i] = to_float(out_bf16[i]);
    return status;
  }
};

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * 4) == 0;
}

}  // namespace wh
