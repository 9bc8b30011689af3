// Gradients on a GPU through the C ABI: graphs, steps and bad pointers. What they should be, the
// case table knows: `widehead check --backward --device cuda`.
#include <algorithm>
#include <array>

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

// Sequences packed into as many tokens as a plan has, of which those behind the last are NaN, and
// log-sum-exps that are all alike: gradients follow from whatever these are.
class PackedGradients {
 public:
  static constexpr int64_t kBatch = 4, kTokens = 600, kMost = 300, kHeadsQ = 4, kHeadsKv = 2;
  using Lengths = std::array<int64_t, kBatch>;

  explicit PackedGradients(const std::string& kernel)
      : dim_(kernel == "sm90_backward_wide" ? 320 : 128),
        lse_(std::vector<float>(kTokens * kHeadsQ, 6.0f)),
        offsets_(kBatch * 4 + 4),
        kernel_(kernel) {
    unsigned seed = 1;
    for (auto& input : inputs_) {
      input.bits = random_bf16(kTokens * heads_of(input) * dim_, seed++);
      input.device = std::make_unique<DeviceBuffer>(input.bits.size() * 2);
    }
    for (auto* gradients : {&packed_, &alone_}) {
      for (size_t i = 0; i < gradients->size(); ++i) {
        (*gradients)[i] = std::make_unique<DeviceBuffer>(inputs_[i].bits.size() * 2);
      }
    }
    wh_problem p = problem(kBatch, kMost);
    p.query_layout = WH_QUERIES_PACKED;
    p.key_layout = WH_KEYS_PACKED;
    p.total_q = p.total_k = kTokens;
    EXPECT_EQ(make_plan(p, no_limits(), kernel, plan_), WH_OK) << wh_last_error();
    workspace_ = std::make_unique<DeviceBuffer>(wh_plan_workspace_bytes(plan_.get()));
    workspace_->fill(0xff);
  }

  void set(const Lengths& lengths) {
    std::vector<int32_t> offsets{0};
    for (const int64_t length : lengths) {
      offsets.push_back(offsets.back() + static_cast<int32_t>(length));
    }
    offsets_.upload(offsets);
    for (const auto& input : inputs_) {
      std::vector<uint16_t> bits = input.bits;
      std::fill(bits.begin() + offsets.back() * heads_of(input) * dim_, bits.end(), kNan);
      input.device->upload(bits);
    }
  }
  wh_status run(cudaStream_t stream) const {
    wh_tensors t = tensors(packed_, 0);
    t.query_offsets = t.key_offsets = static_cast<const int32_t*>(offsets_.data());
    t.workspace = workspace_->data();
    t.workspace_bytes = wh_plan_workspace_bytes(plan_.get());
    return run_on(stream, plan_.get(), t);
  }
  void clear() const {
    for (const auto* gradients : {&packed_, &alone_}) {
      for (const auto& one : *gradients) one->fill(0xff);
    }
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }
  void expect_those_of_each_alone(const Lengths& lengths) const {
    wh_limits limits = no_limits();
    limits.kernel = kernel_.c_str();
    int64_t begin = 0;
    for (const int64_t length : lengths) {
      if (length == 0) continue;
      const wh_problem p = problem(1, length);
      const wh_tensors t = tensors(alone_, begin);
      EXPECT_EQ(wh_attention(&p, &limits, &t, nullptr), WH_OK) << wh_last_error();
      begin += length;
    }
    for (size_t i = 0; i < packed_.size(); ++i) {
      EXPECT_EQ(packed_[i]->download<uint16_t>(), alone_[i]->download<uint16_t>()) << i;
    }
  }

 private:
  static constexpr uint16_t kNan = 0xffff;
  struct Input {
    bool is_of_queries;
    std::vector<uint16_t> bits{};
    std::unique_ptr<DeviceBuffer> device{};
  };
  using ThreeBuffers = std::array<std::unique_ptr<DeviceBuffer>, 3>;  // of dq, dk and dv

  static int64_t heads_of(const Input& input) { return input.is_of_queries ? kHeadsQ : kHeadsKv; }
  wh_problem problem(int64_t batch, int64_t most) const {
    wh_problem p = gpu_problem(batch, kHeadsQ, kHeadsKv, most, most, dim_);
    p.pass = WH_BACKWARD;
    p.causal = WH_CAUSAL_BOTTOM_RIGHT;
    p.uses = WH_USES_LOG_SUM_EXP;
    for (auto* strides : {&p.stride_q, &p.stride_out, &p.stride_d_out, &p.stride_dq}) {
      set_strides(*strides, kHeadsQ);
    }
    for (auto* strides : {&p.stride_k, &p.stride_v, &p.stride_dk, &p.stride_dv}) {
      set_strides(*strides, kHeadsKv);
    }
    return p;
  }
  void set_strides(int64_t (&strides)[4], int64_t heads) const {
    strides[0] = kTokens * heads * dim_;
    strides[1] = dim_;
    strides[2] = heads * dim_;
    strides[3] = 1;
  }
  wh_tensors tensors(const ThreeBuffers& gradients, int64_t token) const {
    wh_tensors t;
    EXPECT_EQ(wh_tensors_init(&t, sizeof(t)), WH_OK);
    const auto at = [&](const DeviceBuffer& buffer, int64_t heads) -> void* {
      return static_cast<uint16_t*>(buffer.data()) + token * heads * dim_;
    };
    t.q = at(*inputs_[0].device, kHeadsQ);
    t.k = at(*inputs_[1].device, kHeadsKv);
    t.v = at(*inputs_[2].device, kHeadsKv);
    t.d_out = at(*inputs_[3].device, kHeadsQ);
    t.out = at(*inputs_[4].device, kHeadsQ);
    t.dq = at(*gradients[0], kHeadsQ);
    t.dk = at(*gradients[1], kHeadsKv);
    t.dv = at(*gradients[2], kHeadsKv);
    t.log_sum_exp = static_cast<float*>(lse_.data());
    return t;
  }

  int64_t dim_;
  // q, k, v, d_out and out.
  std::array<Input, 5> inputs_{{{true}, {false}, {false}, {true}, {true}}};
  ThreeBuffers packed_, alone_;
  DeviceBuffer lse_, offsets_;
  std::string kernel_;
  PlanHandle plan_;
  std::unique_ptr<DeviceBuffer> workspace_;
};

TEST_P(GpuGradients, AReplayedGraphOfPackedSequencesFollowsTheirOffsets) {
  PackedGradients gradients(kernel());
  const PackedGradients::Lengths first{33, 0, 300, 129}, then{1, 128, 64, 250};
  gradients.set(first);
  Graph graph;
  graph.capture([&](cudaStream_t stream) { return gradients.run(stream); });
  for (const auto& lengths : {first, then}) {
    gradients.set(lengths);
    gradients.clear();
    graph.replay();
    gradients.expect_those_of_each_alone(lengths);
  }
}

INSTANTIATE_TEST_SUITE_P(Cuda, GpuGradients,
                         testing::Values("sm90_backward", "sm90_backward_wide",
                                         "cuda_portable_backward"),
                         kernel_name);

}  // namespace
}  // namespace wh
