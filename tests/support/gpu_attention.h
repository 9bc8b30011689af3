// Attention on the first GPU through the C ABI, for tests: bf16, dense, with the float64 answer of
// the CPU's oracle. Tests are skipped where there is no GPU.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/float16.h"
#include "support/kernels_under_test.h"
#include "support/makers.h"
#include "verify/errors.h"
#include "widehead/widehead.h"

namespace wh {

inline int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

// Of memory that the device may have and the test must: an allocation that fails is a failure.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    EXPECT_EQ(cudaMalloc(&data_, bytes), cudaSuccess) << bytes << " bytes";
  }
  template <typename T>
  explicit DeviceBuffer(const std::vector<T>& from) : DeviceBuffer(from.size() * sizeof(T)) {
    upload(from);
  }
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  void* data() const { return data_; }
  void fill(int byte) { EXPECT_EQ(cudaMemset(data_, byte, bytes_), cudaSuccess); }
  template <typename T>
  void upload(const std::vector<T>& from) {
    EXPECT_EQ(cudaMemcpy(data_, from.data(), from.size() * sizeof(T), cudaMemcpyDefault),
              cudaSuccess);
  }
  template <typename T>
  std::vector<T> download() const {
    std::vector<T> to(bytes_ / sizeof(T));
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(to.data(), data_, bytes_, cudaMemcpyDefault), cudaSuccess);
    return to;
  }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

// A captured run, to be replayed.
struct Graph {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;

  Graph() { EXPECT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess); }
  ~Graph() {
    if (exec != nullptr) cudaGraphExecDestroy(exec);
    if (graph != nullptr) cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  // Global: a call that allocates, or does anything else a capture must not, fails.
  template <typename Run>
  void capture(Run run) {
    ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    EXPECT_EQ(run(stream), WH_OK) << wh_last_error();
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
  }
  void replay() {
    ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  }
};

inline wh_problem gpu_problem(int64_t batch, int64_t heads_q, int64_t heads_kv, int64_t len_q,
                              int64_t len_k, int64_t dim) {
  wh_problem p = problem_of(batch, heads_q, heads_kv, len_q, len_k, dim);
  p.device = WH_CUDA;
  p.dtype_q = p.dtype_kv = WH_BF16;
  return p;
}

inline std::vector<uint16_t> random_bf16(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<uint16_t> values;
  for (const float value : normal_values(count, random)) {
    values.push_back(from_float<Bfloat16>(value).bits);
  }
  return values;
}

inline wh_status run_on(cudaStream_t stream, const wh_plan* plan, const wh_tensors& tensors) {
  wh_run_options options;
  EXPECT_EQ(wh_run_options_init(&options, sizeof(options)), WH_OK);
  options.stream = stream;
  return wh_plan_run(plan, &tensors, &options);
}

// One problem with its tensors on the device and everything a run needs.
struct GpuAttention {
  wh_problem problem;
  wh_limits limits = no_limits();
  std::vector<uint16_t> q, k, v;
  std::vector<int32_t> key_lengths;
  DeviceBuffer device_q, device_k, device_v, out, device_lengths;
  PlanHandle plan;  // null where planning failed: runs then fail too
  std::unique_ptr<DeviceBuffer> workspace;

  explicit GpuAttention(const wh_problem& p, unsigned seed = 1)
      : GpuAttention(p, random_bf16(p.batch * p.heads_q * p.len_q * p.dim_qk, seed),
                     random_bf16(p.batch * p.heads_kv * p.len_k * p.dim_qk, seed + 1),
                     random_bf16(p.batch * p.heads_kv * p.len_k * p.dim_v, seed + 2)) {}
  GpuAttention(const wh_problem& p, std::vector<uint16_t> q_, std::vector<uint16_t> k_,
               std::vector<uint16_t> v_)
      : problem(p),
        q(std::move(q_)),
        k(std::move(k_)),
        v(std::move(v_)),
        key_lengths(static_cast<size_t>(p.batch), static_cast<int32_t>(p.len_k)),
        device_q(q),
        device_k(k),
        device_v(v),
        out(static_cast<size_t>(p.batch * p.heads_q * p.len_q * p.dim_v) * 2),
        device_lengths(key_lengths),
        workspace(std::make_unique<DeviceBuffer>(0)) {}

  void plan_for(const std::string& kernel) {
    ASSERT_EQ(make_plan(problem, limits, kernel, plan), WH_OK) << wh_last_error();
    workspace = std::make_unique<DeviceBuffer>(wh_plan_workspace_bytes(plan.get()));
  }

  wh_tensors tensors() const {
    wh_tensors t;
    EXPECT_EQ(wh_tensors_init(&t, sizeof(t)), WH_OK);
    t.q = device_q.data();
    t.k = device_k.data();
    t.v = device_v.data();
    t.out = out.data();
    if ((problem.uses & WH_USES_KEY_LENGTHS) != 0) {
      t.key_lengths = static_cast<const int32_t*>(device_lengths.data());
    }
    t.workspace = workspace->data();
    t.workspace_bytes = wh_plan_workspace_bytes(plan.get());
    return t;
  }

  wh_status run(const wh_tensors& t, cudaStream_t stream = nullptr) const {
    return run_on(stream, plan.get(), t);
  }

  // Bits of a fresh run.
  std::vector<uint16_t> run_alone() {
    out.fill(0xff);
    EXPECT_EQ(run(tensors()), WH_OK) << wh_last_error();
    return out.download<uint16_t>();
  }

  // Relative RMS error of `bits` against the oracle with the key lengths given.
  double error_of(const std::vector<uint16_t>& bits, const std::vector<int32_t>& lengths) const {
    wh_problem p = problem;
    p.device = WH_CPU;
    wh_limits oracle = limits;
    oracle.kernel = "cpu_reference";
    std::vector<uint16_t> want(bits.size());
    wh_tensors t;
    EXPECT_EQ(wh_tensors_init(&t, sizeof(t)), WH_OK);
    t.q = q.data();
    t.k = k.data();
    t.v = v.data();
    t.out = want.data();
    t.key_lengths = lengths.data();
    EXPECT_EQ(wh_attention(&p, &oracle, &t, nullptr), WH_OK) << wh_last_error();
    const auto value = [](uint16_t bits_of) { return to_float(Bfloat16{bits_of}); };
    Errors errors;
    for (size_t i = 0; i < bits.size(); ++i) errors.add(value(bits[i]), value(want[i]));
    return errors.relative_rms();
  }
};

// The answer is rounded to bf16 too, hence more than the 7e-3 of the contract.
constexpr double kTolerance = 8e-3;

class GpuKernel : public KernelTest {
 protected:
  static std::string kernel() { return GetParam(); }
  static bool is_prefill() { return kernel().find("prefill") != std::string::npos; }

  // Takes workspace from every kernel: more tiles than multiprocessors under a causal mask, which
  // are claimed from a counter; or so few rows that keys are split.
  static wh_problem problem_with_workspace() {
    wh_problem p =
        is_prefill() ? gpu_problem(1, 8, 8, 4096, 4096, 128) : gpu_problem(1, 8, 2, 1, 20000, 128);
    if (is_prefill()) p.causal = WH_CAUSAL_BOTTOM_RIGHT;
    return p;
  }
};

}  // namespace wh
