// Packed queries and paged keys on a GPU, whose offsets, lengths and tables only the device sees:
// graphs that are replayed with others, batches smaller than the plan's, offsets that lie.

#include <algorithm>
#include <numeric>

#include "support/gpu_attention.h"

namespace wh {
namespace {

constexpr int64_t kBatch = 5, kHeadsQ = 8, kHeadsKv = 2, kDim = 128;
constexpr uint16_t kUntouched = 0xffff;  // NaN

// What a run reads beside q and the pool.
struct Sequences {
  std::vector<int32_t> offsets, lengths, table;
};

class GpuLayouts : public GpuKernel {};

// Queries of up to five sequences, keys in pages of a pool whose unlisted rows are NaN.
class Served {
 public:
  Served(int64_t len_q, int64_t len_k, int64_t page_size)
      : problem_(gpu_problem(kBatch, kHeadsQ, kHeadsKv, len_q, len_k, kDim)),
        queries_(3 * len_q + kBatch),
        entries_((len_k + page_size - 1) / page_size) {
    wh_problem& p = problem_;
    p.query_layout = WH_QUERIES_PACKED;
    p.key_layout = WH_KEYS_PAGED;
    p.total_q = queries_;
    p.page_size = page_size;
    p.pages = kBatch * entries_ + 3;
    p.uses = WH_USES_KEY_LENGTHS;
    p.causal = WH_CAUSAL_BOTTOM_RIGHT;
    EXPECT_EQ(wh_problem_set_dense(&p), WH_OK);
    q_ = random_bf16(queries_ * kHeadsQ * kDim, 1);
    keys_ = random_bf16(p.pages * page_size * kHeadsKv * kDim, 2);
    values_ = random_bf16(p.pages * page_size * kHeadsKv * kDim, 3);
    device_q_ = std::make_unique<DeviceBuffer>(q_);
    k_ = std::make_unique<DeviceBuffer>(keys_.size() * 2);
    v_ = std::make_unique<DeviceBuffer>(values_.size() * 2);
    // A guard of as much in front of out and behind it.
    out_ = std::make_unique<DeviceBuffer>(3 * q_.size() * 2);
    offsets_ = std::make_unique<DeviceBuffer>((kBatch + 1) * 4);
    lengths_ = std::make_unique<DeviceBuffer>(kBatch * 4);
    table_ = std::make_unique<DeviceBuffer>(static_cast<size_t>(kBatch * entries_) * 4);
  }

  // For the first sequences, all of them by default.
  void plan_for(const std::string& kernel, wh_limits limits = no_limits(), int64_t batch = kBatch) {
    wh_problem p = problem_;
    p.batch = batch;
    ASSERT_EQ(make_plan(p, limits, kernel, plan_), WH_OK) << wh_last_error();
    workspace_ = std::make_unique<DeviceBuffer>(wh_plan_workspace_bytes(plan_.get()));
  }

  // Pages in random order; entries past a length are beyond the pool.
  Sequences sequences(const std::vector<int32_t>& queries, const std::vector<int32_t>& lengths,
                      unsigned seed) const {
    Sequences s{{0}, lengths, std::vector<int32_t>(static_cast<size_t>(kBatch * entries_))};
    for (const int32_t count : queries) s.offsets.push_back(s.offsets.back() + count);
    std::vector<int32_t> pool(static_cast<size_t>(problem_.pages));
    std::iota(pool.begin(), pool.end(), 0);
    std::shuffle(pool.begin(), pool.end(), std::mt19937(seed));
    for (size_t i = 0; i < s.table.size(); ++i) {
      const auto b = i / static_cast<size_t>(entries_), page = i % static_cast<size_t>(entries_);
      const bool is_listed = static_cast<int64_t>(page) * problem_.page_size < lengths[b];
      s.table[i] = is_listed ? pool[i] : -1;
    }
    return s;
  }

  void upload(const Sequences& s) {
    poison(s);
    k_->upload(k_of_run_);
    v_->upload(v_of_run_);
    offsets_->upload(s.offsets);
    lengths_->upload(s.lengths);
    table_->upload(s.table);
    out_->fill(0xff);
  }

  wh_tensors tensors(int64_t batch = 0) const {
    wh_tensors t;
    EXPECT_EQ(wh_tensors_init(&t, sizeof(t)), WH_OK);
    t.q = device_q_->data();
    t.k = k_->data();
    t.v = v_->data();
    t.out = static_cast<uint16_t*>(out_->data()) + q_.size();
    t.query_offsets = static_cast<const int32_t*>(offsets_->data());
    t.key_lengths = static_cast<const int32_t*>(lengths_->data());
    t.page_table = static_cast<const int32_t*>(table_->data());
    t.batch = batch;
    t.workspace = workspace_->data();
    t.workspace_bytes = wh_plan_workspace_bytes(plan_.get());
    return t;
  }
  wh_status run(const wh_tensors& t, cudaStream_t stream = nullptr) const {
    return run_on(stream, plan_.get(), t);
  }

  // What the run left: out, once nothing else was found to be written.
  std::vector<uint16_t> out() const {
    const std::vector<uint16_t> all = out_->download<uint16_t>();
    const auto rows = static_cast<std::ptrdiff_t>(q_.size());
    const auto is_touched = [](uint16_t bits) { return bits != kUntouched; };
    EXPECT_TRUE(std::none_of(all.begin(), all.begin() + rows, is_touched)) << "in front of out";
    EXPECT_TRUE(std::none_of(all.end() - rows, all.end(), is_touched)) << "behind out";
    EXPECT_EQ(k_->download<uint16_t>(), k_of_run_);
    EXPECT_EQ(v_->download<uint16_t>(), v_of_run_);
    return {all.begin() + rows, all.end() - rows};
  }
  // Of the first sequences, beside the oracle's; the rows behind them are as they were.
  void check(const Sequences& s, int64_t batch = kBatch) {
    const std::vector<uint16_t> have = out();
    wh_problem p = problem_;
    p.device = WH_CPU;
    wh_limits oracle = no_limits();
    oracle.kernel = "cpu_reference";
    std::vector<uint16_t> want(have.size(), kUntouched);
    wh_tensors t;
    ASSERT_EQ(wh_tensors_init(&t, sizeof(t)), WH_OK);
    t.q = q_.data();
    t.k = k_of_run_.data();
    t.v = v_of_run_.data();
    t.out = want.data();
    t.query_offsets = s.offsets.data();
    t.key_lengths = s.lengths.data();
    t.page_table = s.table.data();
    p.batch = batch;
    ASSERT_EQ(wh_attention(&p, &oracle, &t, nullptr), WH_OK) << wh_last_error();
    const auto rows = static_cast<size_t>(s.offsets[static_cast<size_t>(batch)]) * kHeadsQ * kDim;
    Errors errors;
    for (size_t i = 0; i < rows; ++i) {
      errors.add(to_float(Bfloat16{have[i]}), to_float(Bfloat16{want[i]}));
    }
    EXPECT_LE(errors.relative_rms(), kTolerance);
    for (size_t i = rows; i < have.size(); ++i) ASSERT_EQ(have[i], kUntouched) << i;
  }

 private:
  // Rows of the pool that no sequence lists are NaN.
  void poison(const Sequences& s) {
    const int64_t row = kHeadsKv * kDim, page_size = problem_.page_size;
    k_of_run_.assign(keys_.size(), kUntouched);
    v_of_run_.assign(values_.size(), kUntouched);
    for (int64_t b = 0; b < kBatch; ++b) {
      for (int64_t key = 0; key < s.lengths[static_cast<size_t>(b)]; ++key) {
        const int64_t page = s.table[static_cast<size_t>(b * entries_ + key / page_size)];
        const int64_t first = (page * page_size + key % page_size) * row;
        std::copy_n(keys_.begin() + first, row, k_of_run_.begin() + first);
        std::copy_n(values_.begin() + first, row, v_of_run_.begin() + first);
      }
    }
  }

  wh_problem problem_;
  int64_t queries_, entries_;  // q has room for; of the table, a sequence
  std::vector<uint16_t> q_, keys_, values_, k_of_run_, v_of_run_;
  std::unique_ptr<DeviceBuffer> device_q_, k_, v_, out_, offsets_, lengths_, table_, workspace_;
  PlanHandle plan_;
};

// Prompts, tokens, none, by the most that one may have; and keys around pages and tiles.
std::vector<std::vector<int32_t>> query_counts(int32_t most) {
  return {{most, 1, 0, 1, most}, {1, 1, 1, 1, 1}, {0, most, 0, most / 2, 1}, {0, 0, 0, 0, 0}};
}
std::vector<std::vector<int32_t>> key_lengths(int32_t most) {
  return {{most, 1, 70, 64, most - 1},
          {0, most, 17, most / 2, 128},
          {most, most, most, most, most},
          {63, 65, 0, most, 1}};
}

TEST_P(GpuLayouts, AReplayedGraphFollowsOffsetsLengthsAndTables) {
  for (const int64_t page_size : {1, 16, 48, 64, 528}) {
    if (page_size % 8 != 0 && kernel() != "cuda_portable") continue;  // TMA takes no such box
    for (const int64_t len_q : {int64_t{1}, int64_t{90}}) {
      constexpr int64_t kLenK = 1200;
      Served served(len_q, kLenK, page_size);
      served.plan_for(kernel());
      const auto counts = query_counts(static_cast<int32_t>(len_q));
      const auto lengths = key_lengths(kLenK);
      served.upload(served.sequences(counts[0], lengths[0], 1));
      ASSERT_EQ(served.run(served.tensors()), WH_OK) << wh_last_error();
      Graph graph;
      graph.capture([&](cudaStream_t stream) { return served.run(served.tensors(), stream); });
      ASSERT_NE(graph.exec, nullptr);
      for (unsigned i = 0; i < counts.size(); ++i) {
        const Sequences s = served.sequences(counts[i], lengths[i], i);
        served.upload(s);
        graph.replay();
        SCOPED_TRACE(testing::Message()
                     << "pages of " << page_size << ", len_q " << len_q << ", replay " << i);
        served.check(s);
      }
    }
  }
}

TEST_P(GpuLayouts, ASmallerBatchRunsOnThePlanOfALarger) {
  Served served(40, 700, 16);
  served.plan_for(kernel());
  const Sequences s = served.sequences({40, 1, 7, 1, 20}, {700, 33, 64, 16, 1}, 5);
  for (int64_t batch = 1; batch <= kBatch; ++batch) {
    served.upload(s);
    ASSERT_EQ(served.run(served.tensors(batch)), WH_OK) << wh_last_error();
    served.check(s, batch);
  }
}

// A sequence's bits are those that it has alone.
TEST_P(GpuLayouts, BatchInvariantRowsKeepTheirBits) {
  wh_limits limits = no_limits();
  limits.batch_invariant = 1;
  Served served(30, 1500, 16);
  served.plan_for(kernel(), limits);
  const Sequences all = served.sequences({30, 1, 1, 1, 30}, {1500, 900, 40, 0, 77}, 3);
  served.upload(all);
  ASSERT_EQ(served.run(served.tensors()), WH_OK) << wh_last_error();
  const std::vector<uint16_t> want = served.out();
  served.plan_for(kernel(), limits, 1);
  served.upload(all);
  ASSERT_EQ(served.run(served.tensors()), WH_OK) << wh_last_error();
  const std::vector<uint16_t> alone = served.out();
  const auto rows = static_cast<std::ptrdiff_t>(30 * kHeadsQ * kDim);
  EXPECT_TRUE(std::equal(alone.begin(), alone.begin() + rows, want.begin()));
}

// Nobody looks at them: what they say writes nothing outside of out.
TEST_P(GpuLayouts, OffsetsThatLieWriteNothingOutsideOfOut) {
  Served served(40, 300, 16);
  served.plan_for(kernel());
  Sequences s = served.sequences({40, 1, 7, 1, 20}, {300, 33, 64, 16, 1}, 5);
  constexpr int32_t kFar = 1 << 30;
  for (const std::vector<int32_t>& offsets :
       {std::vector<int32_t>{-kFar, kFar, -kFar, kFar, -1, kFar},
        {90, 80, 70, 60, 50, 40},
        {kFar, kFar, kFar, kFar, kFar, kFar},
        {-5, -4, -3, -2, -1, 1000}}) {
    s.offsets = offsets;
    served.upload(s);
    ASSERT_EQ(served.run(served.tensors()), WH_OK) << wh_last_error();
    served.out();
  }
}

INSTANTIATE_TEST_SUITE_P(Cuda, GpuLayouts,
                         testing::Values("cuda_portable", "sm90_decode", "sm90_prefill",
                                         "sm90_prefill_wide"),
                         kernel_name);

}  // namespace
}  // namespace wh
