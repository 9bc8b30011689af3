// What a planned call costs on the host before the kernel starts on an NVIDIA GPU, beside the
// smallest thing that the driver can be asked for. Nothing runs without a GPU.
#include <benchmark/benchmark.h>
#include <cuda_runtime_api.h>

#include "widehead/widehead.h"

namespace {

// In batches that the queue of launches holds, so that no call waits for the device.
template <typename Call>
void time_batches(benchmark::State& state, Call call) {
  constexpr int kCalls = 100;
  for (auto _ : state) {
    for (int i = 0; i < kCalls; ++i) call();
    state.PauseTiming();
    if (cudaDeviceSynchronize() != cudaSuccess) state.SkipWithError("the device failed");
    state.ResumeTiming();
  }
  state.SetItemsProcessed(state.iterations() * kCalls);
}

void planned_call(benchmark::State& state, const char* kernel) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    return state.SkipWithError("no NVIDIA GPU");
  }
  wh_problem problem;
  wh_problem_init(&problem, sizeof(problem));
  problem.device = WH_CUDA;
  problem.dtype_q = problem.dtype_kv = WH_BF16;
  problem.heads_q = 8;
  problem.heads_kv = 2;
  problem.len_q = 1;
  problem.len_k = 32;
  problem.dim_qk = problem.dim_v = 128;
  wh_problem_set_dense(&problem);
  wh_limits limits;
  wh_limits_init(&limits, sizeof(limits));
  limits.kernel = kernel;
  wh_plan* plan = nullptr;
  if (wh_plan_create(&problem, &limits, &plan) != WH_OK)
    return state.SkipWithError(wh_last_error());
  constexpr size_t kTensorBytes = 64 << 10;
  void* base = nullptr;
  if (cudaMalloc(&base, 5 * kTensorBytes) != cudaSuccess) return state.SkipWithError("no memory");
  auto* memory = static_cast<char*>(base);
  wh_tensors tensors;
  wh_tensors_init(&tensors, sizeof(tensors));
  tensors.q = memory;
  tensors.k = memory + kTensorBytes;
  tensors.v = memory + 2 * kTensorBytes;
  tensors.out = memory + 3 * kTensorBytes;
  tensors.workspace = memory + 4 * kTensorBytes;
  tensors.workspace_bytes = wh_plan_workspace_bytes(plan);
  time_batches(state, [&] {
    if (wh_plan_run(plan, &tensors, nullptr) != WH_OK) state.SkipWithError(wh_last_error());
  });
  cudaFree(base);
  wh_plan_destroy(plan);
}
BENCHMARK_CAPTURE(planned_call, sm90_prefill, "sm90_prefill")->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(planned_call, sm90_decode, "sm90_decode")->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(planned_call, cuda_portable, "cuda_portable")->Unit(benchmark::kMicrosecond);

void driver_call(benchmark::State& state) {
  void* memory = nullptr;
  if (cudaMalloc(&memory, 4) != cudaSuccess) return state.SkipWithError("no NVIDIA GPU");
  time_batches(state, [&] {
    if (cudaMemsetAsync(memory, 0, 4, nullptr) != cudaSuccess) state.SkipWithError("it failed");
  });
  cudaFree(memory);
}
BENCHMARK(driver_call)->Unit(benchmark::kMicrosecond);

}  // namespace

BENCHMARK_MAIN();
