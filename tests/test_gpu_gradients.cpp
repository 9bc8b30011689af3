// Gradients on a GPU through the C ABI: graphs, steps and bad pointers. What they should be, the
// case table knows: `widehead check --backward --device cuda`.
#include "support/gpu_attention.h"

namespace wh {
namespace {

// A forward pass and what its gradients take.
struct Gradients {
  GpuAttention forward;
  wh_problem problem;
  wh_limits limits = no_limits();
  DeviceBuffer lse, d_out, dq, dk, dv;
  PlanHandle plan;
  std::unique_ptr<DeviceBuffer> workspace;

  explicit Gradients(int64_t batch = 4)
      : forward(causal_problem(batch)),
        problem(forward.problem),
        lse(static_cast<size_t>(problem.batch * problem.heads_q * problem.len_q) * 4),
        d_out(random_bf16(problem.batch * problem.heads_q * problem.len_q * problem.dim_v, 9)),
        dq(forward.q.size() * 2),
        dk(forward.k.size() * 2),
        dv(forward.v.size() * 2) {
    forward.plan_for("cuda_portable");
    wh_tensors t = forward.tensors();
    t.log_sum_exp = static_cast<float*>(lse.data());
    EXPECT_EQ(forward.run(t), WH_OK) << wh_last_error();
    problem.pass = WH_BACKWARD;
    EXPECT_EQ(wh_problem_set_dense(&problem), WH_OK);
  }
  static wh_problem causal_problem(int64_t batch) {
    wh_problem p = gpu_problem(batch, 16, 4, 700, 900, 128);
    p.causal = WH_CAUSAL_BOTTOM_RIGHT;
    p.uses = WH_USES_LOG_SUM_EXP;
    return p;
  }

  void plan_for(const std::string& kernel) {
    ASSERT_EQ(make_plan(problem, limits, kernel, plan), WH_OK) << wh_last_error();
    workspace = std::make_unique<DeviceBuffer>(wh_plan_workspace_bytes(plan.get()));
    workspace->fill(0xff);
  }
  wh_tensors tensors() const {
    wh_tensors t = forward.tensors();
    t.log_sum_exp = static_cast<float*>(lse.data());
    t.d_out = d_out.data();
    t.dq = dq.data();
    t.dk = dk.data();
    t.dv = dv.data();
    t.workspace = workspace->data();
    t.workspace_bytes = wh_plan_workspace_bytes(plan.get());
    return t;
  }
  wh_status run(const wh_tensors& t, const wh_run_options* options = nullptr) {
    for (DeviceBuffer* one : {&dq, &dk, &dv}) one->fill(0xff);
    return wh_plan_run(plan.get(), &t, options);
  }
  std::vector<uint16_t> answer() const {
    std::vector<uint16_t> all;
    for (const DeviceBuffer* one : {&dq, &dk, &dv}) {
      const std::vector<uint16_t> bits = one->download<uint16_t>();
      all.insert(all.end(), bits.begin(), bits.end());
    }
    return all;
  }
};

class GpuGradients : public GpuKernel {};

TEST_P(GpuGradients, AReplayedGraphGivesTheBitsOfARun) {
  Gradients gradients;
  gradients.plan_for(kernel());
  const wh_tensors t = gradients.tensors();
  ASSERT_EQ(gradients.run(t), WH_OK) << wh_last_error();
  const std::vector<uint16_t> want = gradients.answer();
  wh_run_options options;
  ASSERT_EQ(wh_run_options_init(&options, sizeof(options)), WH_OK);
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  options.stream = stream;
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  EXPECT_EQ(wh_plan_run(gradients.plan.get(), &t, &options), WH_OK) << wh_last_error();
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
  for (int i = 0; i < 3; ++i) {
    for (DeviceBuffer* one : {&gradients.dq, &gradients.dk, &gradients.dv}) one->fill(0xff);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    EXPECT_EQ(gradients.answer(), want);
  }
  EXPECT_EQ(cudaGraphExecDestroy(exec), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

TEST_P(GpuGradients, StepsGiveTheSameBitsAndStopWhenTold) {
  Gradients gradients(12);  // more than two waves of blocks
  gradients.plan_for(kernel());
  ASSERT_EQ(gradients.run(gradients.tensors()), WH_OK) << wh_last_error();
  const std::vector<uint16_t> want = gradients.answer();
  gradients.limits.longest_step_us = wh_plan_estimated_us(gradients.plan.get()) / 2;
  gradients.plan_for(kernel());
  struct Watch {
    double stop_at;
    int looks = 0;
  };
  wh_run_options options;
  ASSERT_EQ(wh_run_options_init(&options, sizeof(options)), WH_OK);
  options.progress = [](void* context, double fraction) {
    auto& watch = *static_cast<Watch*>(context);
    ++watch.looks;
    return fraction >= watch.stop_at ? 1 : 0;
  };
  Watch whole{2}, stopped{0.2};
  options.progress_context = &whole;
  ASSERT_EQ(gradients.run(gradients.tensors(), &options), WH_OK) << wh_last_error();
  EXPECT_GT(whole.looks, 2);
  EXPECT_EQ(gradients.answer(), want);
  options.progress_context = &stopped;
  EXPECT_EQ(gradients.run(gradients.tensors(), &options), WH_CANCELLED);
  EXPECT_NE(std::string(wh_last_error()).find("the gradients are"), std::string::npos)
      << wh_last_error();
}

TEST_P(GpuGradients, HostMemoryIsAnError) {
  Gradients gradients;
  gradients.plan_for(kernel());
  std::vector<uint16_t> host(gradients.forward.q.size());
  wh_tensors t = gradients.tensors();
  t.d_out = host.data();
  EXPECT_EQ(gradients.run(t), WH_INVALID_ARGUMENT);
  EXPECT_NE(std::string(wh_last_error()).find("d_out is host memory"), std::string::npos)
      << wh_last_error();
  t = gradients.tensors();
  t.dk = host.data();
  EXPECT_EQ(gradients.run(t), WH_INVALID_ARGUMENT);
  EXPECT_NE(std::string(wh_last_error()).find("dk is host memory"), std::string::npos)
      << wh_last_error();
}

INSTANTIATE_TEST_SUITE_P(Cuda, GpuGradients,
                         testing::Values("sm90_backward", "sm90_backward_wide",
                                         "cuda_portable_backward"),
                         kernel_name);

}  // namespace
}  // namespace wh
