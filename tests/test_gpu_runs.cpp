// What holds between runs on a GPU: graphs that are replayed, promises about fresh keys, bits that
// do not depend on the batch.

#include "support/gpu_attention.h"

namespace wh {
namespace {

class GpuRuns : public GpuKernel {};

TEST_P(GpuRuns, AReplayedGraphFollowsTheKeyLengths) {
  wh_problem p =
      is_prefill() ? gpu_problem(2, 8, 2, 300, 900, 128) : gpu_problem(2, 8, 2, 2, 3000, 128);
  p.causal = WH_CAUSAL_BOTTOM_RIGHT;
  p.uses = WH_USES_KEY_LENGTHS;
  GpuAttention attention(p);
  attention.plan_for(kernel());
  attention.run_alone();  // what loads code does so before the capture
  Graph graph;
  graph.capture([&](cudaStream_t stream) { return attention.run(attention.tensors(), stream); });
  ASSERT_NE(graph.exec, nullptr);
  const auto most = static_cast<int32_t>(p.len_k);
  for (const std::vector<int32_t>& lengths :
       {std::vector<int32_t>{most, most / 3}, {17, most - 1}, {most / 2, most}}) {
    attention.device_lengths.upload(lengths);
    attention.out.fill(0xff);
    graph.replay();
    const std::vector<uint16_t> replayed = attention.out.download<uint16_t>();
    EXPECT_LE(attention.error_of(replayed, lengths), kTolerance);
    EXPECT_EQ(replayed, attention.run_alone());
  }
}

TEST_P(GpuRuns, ManyRunsBehindEachOtherGiveTheSameBits) {
  GpuAttention attention(problem_with_workspace());
  attention.plan_for(kernel());
  const std::vector<uint16_t> first = attention.run_alone();
  attention.out.fill(0xff);
  // No wait between them: a run must not see the workspace of the one in front half done.
  for (int i = 0; i < 20; ++i) {
    ASSERT_EQ(attention.run(attention.tensors()), WH_OK) << wh_last_error();
  }
  EXPECT_EQ(attention.out.download<uint16_t>(), first);
}

TEST_P(GpuRuns, APromiseAboutFreshKeysKeepsTheBits) {
  const wh_problem p = gpu_problem(1, 8, 2, 1, 20000, 128);
  GpuAttention attention(p);
  attention.plan_for(kernel());
  const std::vector<uint16_t> plain = attention.run_alone();
  GpuAttention front(gpu_problem(1, 8, 8, 2048, 2048, 128), 7);
  front.plan_for("cuda_portable");
  for (const int64_t fresh : {int64_t{0}, int64_t{1}, int64_t{100}, p.len_k}) {
    attention.limits.fresh_keys = fresh;
    attention.plan_for(kernel());
    for (int i = 0; i < 5; ++i) {
      attention.out.fill(0xff);
      ASSERT_EQ(front.run(front.tensors()), WH_OK) << wh_last_error();
      ASSERT_EQ(attention.run(attention.tensors()), WH_OK) << wh_last_error();
      EXPECT_EQ(attention.out.download<uint16_t>(), plain) << fresh << " fresh keys";
    }
  }
}

TEST_P(GpuRuns, BatchInvariantRowsKeepTheirBits) {
  const int64_t len_q = is_prefill() ? 70 : 1;
  constexpr int64_t kBatch = 16;
  GpuAttention all(gpu_problem(kBatch, 8, 2, len_q, 5000, 128));
  all.limits.batch_invariant = 1;
  all.plan_for(kernel());
  const std::vector<uint16_t> want = all.run_alone();
  const auto entries = [](const std::vector<uint16_t>& of, int64_t first, int64_t count) {
    const auto each = static_cast<int64_t>(of.size()) / kBatch;
    return std::vector<uint16_t>(of.begin() + first * each, of.begin() + (first + count) * each);
  };
  for (const int64_t batch : {1, 2}) {
    const int64_t first = kBatch - batch - 3;
    GpuAttention few(gpu_problem(batch, 8, 2, len_q, 5000, 128), entries(all.q, first, batch),
                     entries(all.k, first, batch), entries(all.v, first, batch));
    few.limits.batch_invariant = 1;
    few.plan_for(kernel());
    EXPECT_EQ(few.run_alone(), entries(want, first, batch)) << "batch " << batch;
  }
}

INSTANTIATE_TEST_SUITE_P(Cuda, GpuRuns, testing::ValuesIn(kernels_under_test()), kernel_name);

}  // namespace
}  // namespace wh
