// The C API over several ranks, with threads for ranks.
#include <gtest/gtest.h>

#include <functional>
#include <thread>

#include "api/c_structs.h"
#include "parallel/exported_communicator.h"
#include "parallel/threads/group.h"
#include "support/sharded_case.h"
#include "widehead/parallel.h"

namespace wh::sharded {
namespace {

struct PlanDeleter {
  void operator()(wh_parallel_plan* plan) const { wh_parallel_plan_destroy(plan); }
};
using OwnedPlan = std::unique_ptr<wh_parallel_plan, PlanDeleter>;

std::vector<wh_token_range> flat(const Sharding& sharding) {
  std::vector<wh_token_range> ranges;
  for (size_t rank = 0; rank < sharding.size(); ++rank) {
    for (const TokenRange& range : sharding[rank]) {
      ranges.push_back({range.begin, range.end, static_cast<int32_t>(rank)});
    }
  }
  return ranges;
}

// What rank `rank` hands to the C API.
struct RankCall {
  RankCall(const ShardedProblem& s, int32_t rank) : q(flat(s.q)), k(flat(s.k)) {
    Problem p = s.whole;
    const LocalLayout& layout = s.layouts[static_cast<size_t>(rank)];
    p.stride_q = layout.q;
    p.stride_k = layout.k;
    p.stride_v = layout.v;
    p.stride_out = layout.out;
    p.pages = layout.pages;
    p.stride_page_table = layout.stride_page_table;
    problem = problem_of(p);
    problem.size = sizeof(problem);
    wh_shards_init(&shards, sizeof(shards));
    shards.ranks = s.ranks();
    shards.q = q.data();
    shards.q_count = q.size();
    shards.k = k.data();
    shards.k_count = k.size();
    shards.key_lengths = s.key_lengths.data();
    shards.key_starts = s.key_starts.data();
    shards.link_gbytes_per_s = 10;
    shards.link_latency_us = 5;
    wh_limits_init(&limits, sizeof(limits));
    limits.threads = 1;
  }
  wh_status plan(const wh_communicator* communicator) {
    wh_parallel_plan* to = nullptr;
    const wh_status status = wh_parallel_plan_create(&problem, &shards, &limits, communicator, &to);
    made.reset(to);
    return status;
  }

  std::vector<wh_token_range> q, k;
  wh_problem problem;
  wh_shards shards;
  wh_limits limits;
  OwnedPlan made;
};

wh_status run(RankCall& call, const ShardedData& data, LocalTensors& local) {
  const Tensors from = data.tensors(local);
  const size_t bytes = wh_parallel_plan_workspace_bytes(call.made.get());
  GuardedTensor workspace(static_cast<int64_t>(bytes));
  wh_tensors t;
  wh_tensors_init(&t, sizeof(t));
  t.q = from.q;
  t.k = from.k;
  t.v = from.v;
  t.out = from.out;
  t.mask = from.mask;
  t.sinks = from.sinks;
  t.log_sum_exp = from.log_sum_exp;
  t.page_table = from.page_table;
  t.workspace = workspace.data();
  t.workspace_bytes = bytes;
  const wh_status status = wh_parallel_plan_run(call.made.get(), &t, nullptr);
  EXPECT_TRUE(workspace.guards_intact());
  return status;
}

// As a thread for each rank, with a communicator of the C API each.
void as_ranks(int32_t ranks, const std::function<void(int32_t, wh_communicator)>& main) {
  ThreadGroup group(ranks);
  std::vector<std::thread> threads;
  for (int32_t r = 0; r < ranks; ++r) {
    threads.emplace_back([&, r] {
      ThreadGroup::Member member(group, r);
      ExportedCommunicator exported(member);
      main(r, exported.c_struct());
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(ParallelC, IsTheWholeInFloat64) {
  for (uint64_t seed = 500; seed < 580; ++seed) {
    const auto ranks = static_cast<int32_t>(1 + seed % 4);
    const CaseKeys keys = seed < 560 ? CaseKeys::kDense : CaseKeys::kPaged;
    ShardedData data = random_case(ranks, seed, Device::kCpu, CaseDims::kSmall, keys);
    SCOPED_TRACE(std::to_string(seed) + ", " + std::to_string(ranks) +
                 " ranks: " + describe(data.problem().whole));
    std::vector<LocalTensors> locals;
    for (int32_t r = 0; r < ranks; ++r) locals.push_back(data.local(r));
    std::vector<std::string> strategies(static_cast<size_t>(ranks));
    as_ranks(ranks, [&](int32_t r, const wh_communicator& communicator) {
      RankCall call(data.problem(), r);
      ASSERT_EQ(call.plan(&communicator), WH_OK) << wh_last_error();
      strategies[static_cast<size_t>(r)] = wh_parallel_plan_strategy(call.made.get());
      ASSERT_EQ(run(call, data, locals[static_cast<size_t>(r)]), WH_OK) << wh_last_error();
    });
    for (const std::string& strategy : strategies) EXPECT_EQ(strategy, strategies.front());
    data.poison();
    for (int32_t r = 0; r < ranks; ++r) data.put(r, locals[static_cast<size_t>(r)]);
    EXPECT_EQ(data.difference(), "");
  }
}

TEST(ParallelC, PlansWithoutAGroupAndSaysWhy) {
  ShardedData data = random_case(3, 7);
  RankCall call(data.problem(), 0);
  call.shards.strategy = "queries";
  ASSERT_EQ(call.plan(nullptr), WH_OK) << wh_last_error();
  EXPECT_STREQ(wh_parallel_plan_strategy(call.made.get()), "queries");
  EXPECT_GT(wh_parallel_plan_estimated_us(call.made.get()), 0);
  EXPECT_GT(wh_parallel_plan_workspace_bytes(call.made.get()), 0u);
  const std::string text = wh_parallel_plan_explain(call.made.get());
  EXPECT_NE(text.find("over 3 ranks"), std::string::npos) << text;
  LocalTensors local = data.local(0);
  EXPECT_EQ(run(call, data, local), WH_INVALID_ARGUMENT);
  EXPECT_STREQ(wh_last_error(),
               "plan has no communicator; it says what would be done and cannot run");
}

TEST(ParallelC, NamesWhatIsWrong) {
  const ShardedData data = random_case(2, 7);
  wh_communicator good;
  wh_communicator_init(&good, sizeof(good));
  good.ranks = 2;
  good.start = [](void*, int32_t, const wh_transfer*, size_t) -> int32_t {
    return WH_DEVICE_ERROR;
  };
  good.finish = [](void*, int32_t, double) -> int32_t { return WH_OK; };
  good.error = [](void*) { return "the cable is out"; };
  struct Wrong {
    std::function<void(RankCall&, wh_communicator&)> spoil;
    const char* message;
  };
  const Wrong all[] = {
      {[](RankCall& c, wh_communicator&) { c.shards.ranks = 0; },
       "shards.ranks is 0; it must be between 1 and 4096"},
      {[](RankCall& c, wh_communicator&) { c.shards.size = 3; }, "shards.size is 3"},
      {[](RankCall&, wh_communicator& c) { c.ranks = 5; },
       "communicator.ranks is 5; shards.ranks is 2"},
      {[](RankCall&, wh_communicator& c) { c.rank = 2; },
       "communicator.rank is 2; it must be between 0 and 1"},
      {[](RankCall&, wh_communicator& c) { c.finish = nullptr; }, "communicator.finish is null"},
      {[](RankCall&, wh_communicator& c) { c.timeout_s = 0; }, "communicator.timeout_s is 0"},
      {[](RankCall&, wh_communicator&) {},
       "communicator.start() on rank 0 answered 4: the cable is out"}};
  for (const Wrong& wrong : all) {
    RankCall call(data.problem(), 0);
    wh_communicator communicator = good;
    wrong.spoil(call, communicator);
    EXPECT_NE(call.plan(&communicator), WH_OK);
    EXPECT_EQ(std::string(wh_last_error()).rfind(wrong.message, 0), 0u) << wh_last_error();
    EXPECT_EQ(call.made, nullptr);
  }
  RankCall call(data.problem(), 0);
  call.q[0].rank = 9;
  EXPECT_EQ(call.plan(nullptr), WH_INVALID_ARGUMENT);
  EXPECT_STREQ(wh_last_error(), "shards.q[0].rank is 9; it must be between 0 and 1");
}

TEST(ParallelC, AFailureIsNoSuccess) {
  EXPECT_EQ(wh_fail(WH_REFUSED, "the cable is out"), WH_REFUSED);
  EXPECT_STREQ(wh_last_error(), "the cable is out");
  EXPECT_EQ(wh_fail(WH_OK, "the cable is out"), WH_INVALID_ARGUMENT);
  EXPECT_STREQ(wh_last_error(), "status of wh_fail() is WH_OK; it must be that of an error");
}

// What may still be under way when nobody came keeps its memory until the caller has ended it.
TEST(ParallelC, WhatCouldNotConnectStaysUntilItIsDestroyed) {
  static int living;
  living = 0;
  class Lonely final : public Communicator {
   public:
    Lonely() { ++living; }
    ~Lonely() override { --living; }
    int32_t rank() const override { return 0; }
    int32_t ranks() const override { return 2; }
    Status start(int32_t, std::span<const Transfer>) override { return {}; }
    Status finish(int32_t, Clock::time_point) override { return {}; }
  };
  wh_communicator c;
  const wh_status status = export_new(
      &c, sizeof(c), []() -> Result<std::unique_ptr<Lonely>> { return std::make_unique<Lonely>(); },
      [](Lonely&) { return Status(Code::kDeviceError, "nobody came"); });
  EXPECT_EQ(status, WH_DEVICE_ERROR);
  EXPECT_STREQ(wh_last_error(), "nobody came");
  EXPECT_EQ(living, 1);
  RankCall call(random_case(2, 7).problem(), 0);
  EXPECT_EQ(call.plan(&c), WH_INVALID_ARGUMENT);
  EXPECT_STREQ(wh_last_error(), "communicator.start is null");
  destroy_exported(&c);
  EXPECT_EQ(living, 0);
  destroy_exported(&c);
}

// What one rank alone gets wrong, every rank hears of.
TEST(ParallelC, TheOthersHearOfAnErrorOfOne) {
  const ShardedData data = random_case(3, 5);
  std::vector<std::string> messages(3);
  as_ranks(3, [&](int32_t r, const wh_communicator& communicator) {
    RankCall call(data.problem(), r);
    if (r == 2) call.problem.dim_qk = 0;
    EXPECT_EQ(call.plan(&communicator), WH_INVALID_ARGUMENT);
    messages[static_cast<size_t>(r)] = wh_last_error();
  });
  EXPECT_EQ(messages[0], "rank 2 cannot take part; its own error says why");
  EXPECT_EQ(messages[1], messages[0]);
  EXPECT_EQ(messages[2].rfind("dim_qk is 0", 0), 0u) << messages[2];
}

// Before it has begun too: the others wait for its messages.
TEST(ParallelC, TheOthersHearOfARunThatFailsByItsArguments) {
  Input input;
  input.problem.len_q = input.problem.len_k = 64;
  input.problem.dim_qk = input.problem.dim_v = 16;
  set_dense(input.problem);
  ShardedData data(input, shard(input.problem, contiguous(64, 3), contiguous(64, 3)));
  std::vector<std::string> messages(3);
  std::vector<LocalTensors> locals;
  for (int32_t r = 0; r < 3; ++r) locals.push_back(data.local(r));
  const auto begin = Communicator::Clock::now();
  as_ranks(3, [&](int32_t r, const wh_communicator& communicator) {
    RankCall call(data.problem(), r);
    call.shards.strategy = "gather";
    ASSERT_EQ(call.plan(&communicator), WH_OK) << wh_last_error();
    const wh_status status = r == 2 ? wh_parallel_plan_run(call.made.get(), nullptr, nullptr)
                                    : run(call, data, locals[static_cast<size_t>(r)]);
    EXPECT_NE(status, WH_OK);
    messages[static_cast<size_t>(r)] = wh_last_error();
  });
  EXPECT_LT(Communicator::Clock::now() - begin, std::chrono::seconds(20));
  for (const size_t rank : {0, 1}) {
    EXPECT_NE(messages[rank].find(gave_up(2).message()), std::string::npos) << messages[rank];
  }
  EXPECT_EQ(messages[2], "tensors is null");
}

}  // namespace
}  // namespace wh::sharded
