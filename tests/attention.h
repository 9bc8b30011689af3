// Attention on f32 tensors, dense, for tests of relations between runs.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "api/machine.h"
#include "plan/plan.h"

namespace wh {

struct Attention {
  Problem problem;
  Limits limits;
  std::vector<float> q, k, v, out, lse;  // the last two hold NaN until a run writes them
  std::vector<int32_t> key_lengths;
  Plan plan;  // of the last run

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
    Result<Plan> made = make_plan(p, limits, this_machine(Device::kCpu, 0));
    if (!made.ok()) return made.status();
    if (Status status = runnable_status(*made); !status.ok()) return status;
    plan = std::move(*made);
    std::vector<std::byte> workspace(plan.workspace_bytes + 64);
    Tensors t;
    t.q = q.data();
    t.k = k.data();
    t.v = v.data();
    t.out = out.data();
    t.log_sum_exp = lse.data();
    t.key_lengths = key_lengths.empty() ? nullptr : key_lengths.data();
    t.workspace =
        reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64);
    t.workspace_bytes = plan.workspace_bytes;
    return find_kernel(kernels_of(Device::kCpu), plan.kernel)
        ->run({plan.problem, plan.config, t, executor, progress});
  }
};

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * 4) == 0;
}

}  // namespace wh
