// What a call costs on the host before a kernel starts: planning, explaining, the cached one call.
#include <benchmark/benchmark.h>

#include <vector>

#include "widehead/widehead.hpp"

namespace {

wh_problem chunked_prefill() {
  wh_problem problem;
  wh_problem_init(&problem, sizeof(problem));
  problem.heads_q = 64;
  problem.heads_kv = 2;
  problem.len_q = 2048;
  problem.len_k = 32768;
  problem.dim_qk = problem.dim_v = 256;
  problem.dtype_q = problem.dtype_kv = WH_F16;
  problem.causal = WH_CAUSAL_BOTTOM_RIGHT;
  wh_problem_set_dense(&problem);
  return problem;
}

void plan_create(benchmark::State& state) {
  const wh_problem problem = chunked_prefill();
  for (auto _ : state) {
    wh_plan* plan = nullptr;
    if (wh_plan_create(&problem, nullptr, &plan) != WH_OK) state.SkipWithError(wh_last_error());
    wh_plan_destroy(plan);
  }
}
BENCHMARK(plan_create)->Unit(benchmark::kMicrosecond);

void plan_explain(benchmark::State& state) {
  const wh_problem problem = chunked_prefill();
  for (auto _ : state) {
    const auto plan = widehead::plan(problem);
    benchmark::DoNotOptimize(plan.explain());
  }
}
BENCHMARK(plan_explain)->Unit(benchmark::kMicrosecond);

// One query on one key: next to nothing but the call.
void smallest_attention(benchmark::State& state) {
  std::vector<float> q(8, 1), k(8, 1), v(8, 1), out(8);
  const auto view = [](std::vector<float>& data) {
    return widehead::TensorView(data.data(), widehead::Dtype::kF32, {1, 1, 1, 8});
  };
  for (auto _ : state) widehead::attention(view(q), view(k), view(v), view(out));
}
BENCHMARK(smallest_attention)->Unit(benchmark::kMicrosecond);

}  // namespace

BENCHMARK_MAIN();
