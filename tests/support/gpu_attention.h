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
#include "verify/errors.h"
#include "widehead/widehead.h"

namespace widehead_gpu {

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

struct PlanDeleter {
  void operator()(wh_plan* plan) const { wh_plan_destroy(plan); }
};
using PlanHandle = std::unique_ptr<wh_plan, PlanDeleter>;

inline wh_problem problem_of(int64_t batch, int64_t heads_q, int64_t heads_kv, int64_t len_q,
                             int64_t len_k, int64_t dim) {
  wh_problem p;
  EXPECT_EQ(wh_problem_init(&p, sizeof(p)), WH_OK);
  p.device = WH_CUDA;
  p.dtype_q = p.dtype_kv = WH_BF16;
  p.batch = batch;
  p.heads_q = heads_q;
  p.heads_kv = heads_kv;
  p.len_q = len_q;
  p.len_k = len_k;
  p.dim_qk = p.dim_v = dim;
  EXPECT_EQ(wh_problem_set_dense(&p), WH_OK);
  return p;
}

inline std::vector<uint16_t> random_bf16(int64_t count, unsigned seed) {
  std::vector<uint16_t> values(static_cast<size_t>(count));
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (uint16_t& value : values) value = wh::from_float<wh::Bfloat16>(normal(random)).bits;
  return values;
}

// One problem with its tensors on the device and everything a run needs.
struct Attention {
  wh_problem problem;
  wh_limits limits{};
  std::vector<uint16_t> q, k, v;
  std::vector<int32_t> key_lengths;
  DeviceBuffer device_q, device_k, device_v, out, device_lengths;
  PlanHandle plan;  // null where planning failed: runs then fail too
  std::unique_ptr<DeviceBuffer> workspace;

  explicit Attention(const wh_problem& p, unsigned seed = 1)
      : Attention(p, random_bf16(p.batch * p.heads_q * p.len_q * p.dim_qk, seed),
                  random_bf16(p.batch * p.heads_kv * p.len_k * p.dim_qk, seed + 1),
                  random_bf16(p.batch * p.heads_kv * p.len_k * p.dim_v, seed + 2)) {}
  Attention(const wh_problem& p, std::vector<uint16_t> q_, std::vector<uint16_t> k_,
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
        workspace(std::make_unique<DeviceBuffer>(0)) {
    EXPECT_EQ(wh_limits_init(&limits, sizeof(limits)), WH_OK);
  }

  void make_plan(const std::string& kernel) {
    limits.kernel = kernel.c_str();
    wh_plan* made = nullptr;
    ASSERT_EQ(wh_plan_create(&problem, &limits, &made), WH_OK) << wh_last_error();
    limits.kernel = nullptr;
    plan.reset(made);
    workspace = std::make_unique<DeviceBuffer>(wh_plan_workspace_bytes(made));
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
    wh_run_options options;
    EXPECT_EQ(wh_run_options_init(&options, sizeof(options)), WH_OK);
    options.stream = stream;
    return wh_plan_run(plan.get(), &t, &options);
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
    const auto value = [](uint16_t bits_of) { return wh::to_float(wh::Bfloat16{bits_of}); };
    wh::Errors errors;
    for (size_t i = 0; i < bits.size(); ++i) errors.add(value(bits[i]), value(want[i]));
    return errors.relative_rms();
  }
};

// The answer is rounded to bf16 too, hence more than the 7e-3 of the contract.
constexpr double kTolerance = 8e-3;

// Tests of one CUDA kernel; those for Hopper are skipped on other cards.
class GpuKernel : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (device_count() == 0) GTEST_SKIP() << "no GPU";
    ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
    int major = 0;
    ASSERT_EQ(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), cudaSuccess);
    if (kernel().rfind("sm90", 0) == 0 && major != 9) GTEST_SKIP() << "no Hopper GPU";
  }

  static std::string kernel() { return GetParam(); }
  static bool is_prefill() { return kernel().find("prefill") != std::string::npos; }

  // Takes workspace from every kernel: more tiles than multiprocessors under a causal mask, which
  // are claimed from a counter; or so few rows that keys are split.
  static wh_problem problem_with_workspace() {
    wh_problem p =
        is_prefill() ? problem_of(1, 8, 8, 4096, 4096, 128) : problem_of(1, 8, 2, 1, 20000, 128);
    if (is_prefill()) p.causal = WH_CAUSAL_BOTTOM_RIGHT;
    return p;
  }
};

constexpr const char* kKernels[] = {"sm90_prefill", "sm90_prefill_wide", "sm90_decode",
                                    "cuda_portable", "cuda_unfused"};

inline std::string kernel_name(const testing::TestParamInfo<const char*>& info) {
  return info.param;
}

}  // namespace widehead_gpu
