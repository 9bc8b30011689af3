// Attention over several ranks: planner, schedules and executor, with threads for ranks.
#include <gtest/gtest.h>

#include <thread>

#include "api/machine.h"
#include "core/carver.h"
#include "core/key_range.h"
#include "parallel/executor.h"
#include "parallel/threads/group.h"
#include "parallel/view.h"
#include "support/sharded_case.h"

namespace wh::sharded {
namespace {

Result<Plan> plan_on_cpu(const Problem& problem, const Limits& limits) {
  return make_plan(problem, limits, this_machine(Device::kCpu, 0));
}

const Executor kSerial{[](void*, int32_t count, Executor::Task task, void* argument) {
                         for (int32_t i = 0; i < count; ++i) task(argument, i);
                       },
                       nullptr};

// Workspace of exactly so many bytes, full of NaN bits.
class ExactWorkspace {
 public:
  explicit ExactWorkspace(size_t bytes)
      : memory_(bytes + kWorkspaceAlignment, std::byte{0xff}), bytes_(bytes) {}
  void give(Tensors& t) {
    const auto at = reinterpret_cast<uintptr_t>(memory_.data());
    t.workspace = memory_.data() + (kWorkspaceAlignment - at % kWorkspaceAlignment);
    t.workspace_bytes = bytes_;
  }

 private:
  std::vector<std::byte> memory_;
  size_t bytes_;
};

Status run_one(ShardedData& sharded, Strategy strategy, int32_t rank, Communicator& communicator,
               LocalTensors& local) {
  const ShardedProblem& s = sharded.problem();
  ParallelRun run;
  run.options.executor = kSerial;
  WH_RETURN_IF_ERROR(agree(s, strategy, {}, communicator, run));
  const Result<RankPlan> plan = make_rank_plan(s, strategy, rank, {}, plan_on_cpu);
  if (!plan.ok()) return plan.status();
  Tensors tensors = sharded.tensors(local);
  ExactWorkspace workspace(plan->workspace_bytes);
  workspace.give(tensors);
  return run_rank(s, *plan, tensors, communicator, run);
}

// On threads; the answers of all ranks in the case's own tensors.
void run_all(ShardedData& sharded, Strategy strategy, std::vector<LocalTensors>& locals) {
  const int32_t ranks = sharded.problem().ranks();
  ThreadGroup group(ranks);
  std::vector<std::thread> threads;
  std::vector<Status> statuses(static_cast<size_t>(ranks));
  locals.clear();
  for (int32_t r = 0; r < ranks; ++r) locals.push_back(sharded.local(r));
  for (int32_t r = 0; r < ranks; ++r) {
    threads.emplace_back([&, r] {
      ThreadGroup::Member member(group, r);
      const auto i = static_cast<size_t>(r);
      statuses[i] = run_one(sharded, strategy, r, member, locals[i]);
    });
  }
  for (std::thread& thread : threads) thread.join();
  sharded.poison();
  for (int32_t r = 0; r < ranks; ++r) {
    const auto i = static_cast<size_t>(r);
    ASSERT_TRUE(statuses[i].ok()) << "rank " << r << ": " << statuses[i].message();
    sharded.put(r, locals[i]);
  }
}

class Parallel : public testing::TestWithParam<Strategy> {};

TEST_P(Parallel, IsTheWholeInFloat64) {
  int done = 0;
  for (uint64_t seed = 0; seed < 160; ++seed) {
    const auto ranks = static_cast<int32_t>(1 + seed % 5);
    ShardedData sharded = random_case(ranks, seed);
    SCOPED_TRACE(std::to_string(seed) + ", " + std::to_string(ranks) +
                 " ranks: " + describe(sharded.whole()));
    if (!refusal(sharded.problem(), GetParam()).empty()) continue;
    std::vector<LocalTensors> locals;
    run_all(sharded, GetParam(), locals);
    if (HasFatalFailure()) return;
    const std::string difference = sharded.difference();
    EXPECT_TRUE(difference.empty()) << difference;
    ++done;
  }
  EXPECT_GE(done, GetParam() == Strategy::kHeads ? 60 : 160);
}

TEST_P(Parallel, IsTheSameBitsEveryTime) {
  ShardedData sharded = random_case(3, 12);
  std::vector<LocalTensors> first, second;
  if (!refusal(sharded.problem(), GetParam()).empty()) GTEST_SKIP();
  run_all(sharded, GetParam(), first);
  run_all(sharded, GetParam(), second);
  for (size_t i = 0; i < first.size(); ++i) EXPECT_EQ(first[i].out, second[i].out);
}

// Each rank's keys in pages of its own, in any order; what holds no key that is there is no page.
TEST(ParallelPages, AreTheWholeInFloat64) {
  for (uint64_t seed = 0; seed < 160; ++seed) {
    const auto ranks = static_cast<int32_t>(1 + seed % 4);
    ShardedData sharded =
        random_case(ranks, seed, Device::kCpu, CaseDims::kSmall, CaseKeys::kPaged);
    SCOPED_TRACE(std::to_string(seed) + ", " + std::to_string(ranks) +
                 " ranks: " + describe(sharded.problem().whole));
    ASSERT_EQ(refusal(sharded.problem(), Strategy::kQueries), "");
    std::vector<LocalTensors> locals;
    run_all(sharded, Strategy::kQueries, locals);
    if (HasFatalFailure()) return;
    EXPECT_EQ(sharded.difference(), "");
  }
}

INSTANTIATE_TEST_SUITE_P(Strategies, Parallel,
                         testing::Values(Strategy::kRing, Strategy::kGather, Strategy::kHeads,
                                         Strategy::kQueries, Strategy::kOneRank),
                         [](const auto& info) {
                           return std::string(kStrategies.name(info.param));
                         });

// Every pair of a query and a key that the whole makes visible is in one view, and no other is.
TEST(ParallelViews, HoldWhatTheWholeMakesVisible) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 3000; ++i) {
    Problem p;
    p.len_q = static_cast<int64_t>(random() % 12);
    p.len_k = static_cast<int64_t>(random() % 12);
    p.causal = static_cast<Causal>(random() % 3);
    if (random() % 2 == 0) p.window_left = static_cast<int64_t>(random() % 8);
    if (random() % 2 == 0) p.window_right = static_cast<int64_t>(random() % 8);
    const auto end = static_cast<int64_t>(random() % static_cast<uint64_t>(p.len_k + 1));
    const TokenRange present{end / 3, end};
    const auto cut = [&](int64_t length) {
      const auto a = static_cast<int64_t>(random() % static_cast<uint64_t>(length + 1));
      const auto b = static_cast<int64_t>(random() % static_cast<uint64_t>(length + 1));
      return TokenRange{std::min(a, b), std::max(a, b)};
    };
    const TokenRange q = cut(p.len_q), k = cut(p.len_k);
    const View view = view_of(p, present, q, k);
    Problem part;
    part.len_q = view.q.size();
    part.len_k = view.k.size();
    part.window_left = view.window_left;
    part.window_right = view.window_right;
    ASSERT_GE(view.window_left, kUnlimited);
    ASSERT_GE(view.window_right, kUnlimited);
    for (int64_t query = q.begin; query < q.end; ++query) {
      KeyRange want = visible_keys(p, KeyRange{present.begin, present.end}, query);
      want = {std::max(want.begin, k.begin), std::min(want.end, k.end)};
      KeyRange have{0, 0};
      if (!view.empty() && view.q.begin <= query && query < view.q.end) {
        have = visible_keys(part, KeyRange{0, part.len_k}, query - view.q.begin);
        have = {have.begin + view.k.begin, have.end + view.k.begin};
      }
      ASSERT_EQ(have.size(), want.size()) << describe(p) << ", query " << query;
      if (!want.empty()) {
        ASSERT_EQ(have.begin, want.begin);
      }
    }
  }
}

Result<ParallelPlan> plan_of(const Problem& p, const Sharding& q, const Sharding& k,
                             const Link& link, const ParallelLimits& limits = {}) {
  return make_parallel_plan(shard(p, q, k), limits, link, plan_on_cpu);
}
constexpr Link kFast{400, 5, 50};

TEST(ParallelPlans, ZigzagIsEven) {
  const Problem p = causal(8, 2, 64, 8192, 8192);
  ParallelLimits ring;
  ring.strategy = "ring";
  const auto even = plan_of(p, zigzag(8192, 4), zigzag(8192, 4), kFast, ring);
  const auto uneven = plan_of(p, contiguous(8192, 4), contiguous(8192, 4), kFast, ring);
  ASSERT_TRUE(even.ok() && uneven.ok());
  EXPECT_LT(even->best().estimated_us, 0.7 * uneven->best().estimated_us);
  EXPECT_GT(even->alone_us / even->best().estimated_us, 0.8 * 4);
}

TEST(ParallelPlans, WindowsSendOnlyWhatTheyNeed) {
  Problem p = causal(8, 2, 64, 8192, 8192);
  const Sharding parts = contiguous(8192, 4);
  ParallelLimits ring;
  ring.strategy = "ring";
  const auto all = plan_of(p, parts, parts, kFast, ring);
  p.window_left = 511;
  const auto window = plan_of(p, parts, parts, kFast, ring);
  ASSERT_TRUE(all.ok() && window.ok());
  // K and V of 511 keys of 2 heads at each of three borders.
  EXPECT_EQ(window->best().sent_bytes, 3 * 511 * 2 * 2 * 64 * 2);
  EXPECT_EQ(all->best().sent_bytes, (3 + 2 + 1) * 2048 * 2 * 2 * 64 * 2);
}

TEST(ParallelPlans, DecodeSendsQueriesAndASlowLinkLeavesOneDeviceFaster) {
  const Problem p = causal(16, 2, 128, 1, 262144);
  Sharding q(4);
  q[0] = {{0, 1}};
  const auto fast = plan_of(p, q, contiguous(262144, 4), kFast);
  ASSERT_TRUE(fast.ok());
  EXPECT_EQ(fast->best().strategy, Strategy::kQueries) << explain(*fast);
  EXPECT_GT(fast->alone_us, 2.5 * fast->best().estimated_us) << explain(*fast);
  // A query to each of three, and from each one message with its part of the answer.
  const int64_t part = 16 * (128 + 1) * 4, query = 16 * 128 * 2;
  EXPECT_EQ(fast->best().sent_bytes, 3 * (query + part));
  Sharding on_one(4);
  on_one[2] = {{0, 262144}};
  const Problem small = causal(16, 2, 128, 1, 1024);
  const auto slow = plan_of(small, q, contiguous(1024, 4), {0.001, 5000, 50});
  ASSERT_TRUE(slow.ok());
  EXPECT_LT(slow->alone_us, slow->best().estimated_us);
  EXPECT_NE(explain(*slow).find("that is faster"), std::string::npos) << explain(*slow);
}

TEST(ParallelPlans, SayWhyNot) {
  const Problem p = causal(6, 3, 64, 256, 256);
  const auto plan = plan_of(p, contiguous(256, 4), contiguous(256, 4), kFast);
  ASSERT_TRUE(plan.ok());
  const std::string text = explain(*plan);
  EXPECT_NE(text.find("6 query heads of 3 kv heads have no even shares for 4 ranks"),
            std::string::npos)
      << text;
  ParallelLimits tight;
  tight.each.workspace_bytes = 100;
  const auto none = plan_of(p, contiguous(256, 4), contiguous(256, 4), kFast, tight);
  ASSERT_TRUE(none.ok());
  EXPECT_FALSE(none->runnable());
  EXPECT_NE(runnable_status(*none).message().find("the limit is 100 B"), std::string::npos)
      << runnable_status(*none).message();
  ParallelLimits wrong;
  wrong.strategy = "star";
  const auto unknown = plan_of(p, contiguous(256, 4), contiguous(256, 4), kFast, wrong);
  EXPECT_EQ(unknown.status().message(),
            "strategy is \"star\"; valid: ring, gather, heads, queries, one_rank");
  Sharding twice = contiguous(256, 4);
  twice[1][0].begin -= 1;
  const auto overlap = plan_of(p, contiguous(256, 4), twice, kFast);
  EXPECT_EQ(overlap.status().message(),
            "k token 63 belongs to two ranks; each must belong to one rank");
}

TEST(ParallelPlans, PagesStayWhereTheyAre) {
  Problem p = causal(16, 2, 128, 1, 262144);
  p.key_layout = KeyLayout::kPaged;
  p.page_size = 64;
  p.has_key_lengths = true;
  Sharding q(4);
  q[0] = {{0, 1}};
  ShardedProblem s = shard(p, q, contiguous(262144, 4));
  EXPECT_EQ(s.layouts[1].pages, 1024);
  s.key_lengths = {262144};
  const auto plan = make_parallel_plan(s, {}, kFast, plan_on_cpu);
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  EXPECT_EQ(plan->best().strategy, Strategy::kQueries);
  const int64_t part = 16 * (128 + 1) * 4, query = 16 * 128 * 2;
  EXPECT_EQ(plan->best().sent_bytes, 3 * (query + part));
  EXPECT_GT(plan->alone_us, 2.5 * plan->best().estimated_us) << explain(*plan);
  for (const StrategyCandidate& candidate : plan->candidates) {
    if (candidate.strategy == Strategy::kQueries) continue;
    EXPECT_EQ(candidate.verdict, Verdict::kRefused);
    EXPECT_EQ(candidate.reason, "key_layout is paged; only queries leaves K and V where they are");
  }
  s.whole.mask = MaskKind::kBoolean;
  s.k[0] = {{100, 65536}, {0, 100}};
  EXPECT_EQ(refusal(s, Strategy::kQueries),
            "mask is boolean and key_layout paged; each rank's tokens of k must ascend");
}

// A kernel that fills the device would keep the query from those who wait for it, and every merge
// of a decode is a launch that the next one waits for.
TEST(ParallelPlans, ADecodeHasItsQueryOnTheWayBeforeItAttendsAndMergesAllAnswersAtOnce) {
  Problem p = causal(16, 2, 128, 1, 262144);
  p.device = Device::kCuda;
  Sharding q(4);
  q[0] = {{0, 1}};
  const ShardedProblem s = shard(p, q, contiguous(262144, 4));
  const Schedule schedule = make_schedule(s, Strategy::kQueries, 0);
  const auto place = [&](const auto& is) {
    return std::find_if(schedule.steps.begin(), schedule.steps.end(), is) - schedule.steps.begin();
  };
  const auto query_is_there = place([](const Step& step) {
    const auto* finish = std::get_if<Finish>(&step);
    return finish != nullptr && finish->exchange == 0;
  });
  const auto attends = place([](const Step& step) {
    const auto* attend = std::get_if<Attend>(&step);
    return attend != nullptr && attend->problem.len_k > 0;
  });
  EXPECT_LT(query_is_there, attends);
  EXPECT_LT(attends, static_cast<std::ptrdiff_t>(schedule.steps.size()));
  std::vector<size_t> merged;
  for (const Step& step : schedule.steps) {
    if (const auto* merge = std::get_if<Merge>(&step)) merged.push_back(merge->parts.size());
  }
  EXPECT_EQ(merged, (std::vector<size_t>{2, 4})) << "its own keys, then those of three others";
}

// Messages that take long pass beside the work.
TEST(ParallelPlans, ALongMessageOfQueriesIsNotWaitedForFirst) {
  Problem p = causal(8, 2, 64, 8192, 8192);
  p.device = Device::kCuda;
  const ShardedProblem s = shard(p, zigzag(8192, 2), zigzag(8192, 2));
  const Schedule schedule = make_schedule(s, Strategy::kQueries, 1);
  int attended = 0;
  for (const Step& step : schedule.steps) {
    if (const auto* attend = std::get_if<Attend>(&step)) attended += attend->problem.len_k > 0;
    if (std::holds_alternative<Finish>(step)) break;
  }
  EXPECT_GT(attended, 0);
}

// Sequences of lengths of their own, some of which end before the keys of the last ranks begin.
TEST(ParallelPlans, ABatchOfLengthsIsOneAttentionOnEachRank) {
  for (const KeyLayout layout : {KeyLayout::kDense, KeyLayout::kPaged}) {
    Problem p = causal(16, 2, 128, 1, 4096);
    p.batch = 6;
    p.has_key_lengths = true;
    p.key_layout = layout;
    p.page_size = layout == KeyLayout::kPaged ? 64 : 0;
    set_dense(p);
    Sharding q(4);
    q[0] = {{0, 1}};
    ShardedProblem s = shard(p, q, contiguous(4096, 4));
    s.key_lengths = {4096, 3000, 100, 3500, 1024, 17};
    const int64_t batches[] = {6, 4, 4, 4};  // from the first to the last one that has keys there
    for (int32_t rank = 0; rank < 4; ++rank) {
      const Schedule schedule = make_schedule(s, Strategy::kQueries, rank);
      int pieces = 0;
      for (const Step& step : schedule.steps) {
        const auto* attend = std::get_if<Attend>(&step);
        if (attend == nullptr || attend->problem.len_k == 0) continue;
        EXPECT_EQ(attend->problem.batch, batches[rank]);
        EXPECT_EQ(attend->problem.key_layout, layout);
        ++pieces;
      }
      EXPECT_EQ(pieces, 1) << "rank " << rank;
    }
  }
}

TEST(ParallelPlans, RefuseKindsByTheirField) {
  const auto refused = [](const auto& spoil) {
    Problem p = causal(4, 2, 64, 64, 64);
    spoil(p);
    return plan_of(p, contiguous(64, 2), contiguous(64, 2), kFast).status().message();
  };
  EXPECT_EQ(refused([](Problem& p) { p.query_layout = QueryLayout::kPacked; }),
            "query_layout is packed; of a sharded problem it must be dense");
  EXPECT_EQ(refused([](Problem& p) { p.key_layout = KeyLayout::kPacked; }),
            "key_layout is packed; of a sharded problem it must be dense or paged");
  EXPECT_EQ(refused([](Problem& p) { p.has_page_offsets = true; }),
            "uses says page_offsets; the page table of a sharded problem must have rows");
  EXPECT_EQ(refused([](Problem& p) { p.quantised_v = Quantised::kInt8; }),
            "quantised_k is none and quantised_v int8; of a sharded problem both must be none");
}

// Every rank hears of it, within the time-out.
TEST(ParallelRuns, DisagreementAndAbsenceAreErrorsOnEveryRank) {
  const auto run_two = [](const auto& spoil, std::vector<Status>& statuses, bool second_comes) {
    ThreadGroup group(2);
    statuses.assign(2, {});
    std::vector<std::thread> threads;
    for (int32_t r = 0; r < (second_comes ? 2 : 1); ++r) {
      threads.emplace_back([&, r] {
        ShardedProblem s = shard(causal(4, 2, 64, 64, 64), contiguous(64, 2), contiguous(64, 2));
        Status own;
        if (r == 1) spoil(s, own);
        ThreadGroup::Member member(group, r);
        ParallelRun run;
        run.timeout = std::chrono::milliseconds(200);
        statuses[static_cast<size_t>(r)] = agree(s, Strategy::kRing, own, member, run);
      });
    }
    for (std::thread& thread : threads) thread.join();
  };
  std::vector<Status> statuses;
  run_two([](ShardedProblem& s, Status&) { s.whole.window_left = 7; }, statuses, true);
  for (const Status& status : statuses) {
    EXPECT_EQ(status.message(),
              "window_left is 7 on rank 1 and -1 on rank 0; all ranks must agree");
  }
  run_two([](ShardedProblem& s, Status&) { s.k = zigzag(64, 2); }, statuses, true);
  for (const Status& status : statuses) {
    EXPECT_EQ(status.message(),
              "tokens of k of rank 1 is not that of rank 0; all ranks must agree");
  }
  run_two(
      [](ShardedProblem&, Status& own) {
        own = {Code::kOutOfMemory, "no memory"};
      },
      statuses, true);
  EXPECT_EQ(statuses[0].message(), "rank 1 cannot take part; its own error says why");
  EXPECT_EQ(statuses[0].code(), Code::kOutOfMemory);
  EXPECT_EQ(statuses[1].message(), "no memory");
  run_two([](ShardedProblem&, Status&) {}, statuses, false);
  EXPECT_EQ(statuses[0].message().rfind("rank 1 did not take ", 0), 0u) << statuses[0].message();
  EXPECT_EQ(statuses[0].code(), Code::kDeviceError);
}

// Its memory may be gone by the time that another rank would read or write it.
TEST(ParallelRuns, AFailureEndsTheMessagesOfEveryRank) {
  ThreadGroup group(2);
  ThreadGroup::Member failing(group, 0), other(group, 1);
  const ShardedProblem s = shard(causal(4, 2, 64, 64, 64), contiguous(64, 2), contiguous(64, 2));
  Result<Plan> attention = plan_on_cpu(s.whole, {});
  ASSERT_TRUE(attention.ok());
  RankPlan plan;
  plan.plans.push_back(std::make_shared<const Plan>(std::move(*attention)));
  Attend of_null_pointers{};
  of_null_pointers.problem = s.whole;
  of_null_pointers.plan = 0;
  plan.schedule.steps = {Start{0, {{1, true, {kQ}, 4}, {1, false, {kOut}, 4}}}, of_null_pointers};
  int32_t sent = 7, received = 0, of_other = 1;
  Tensors tensors;
  tensors.q = &sent;
  tensors.out = &received;
  EXPECT_FALSE(run_rank(s, plan, tensors, failing, {}).ok());
  const Communicator::Transfer answer[] = {{0, true, &of_other, 4}, {0, false, &of_other, 4}};
  EXPECT_EQ(other.start(0, answer).message(), "rank 0 failed; its own error says why");
  EXPECT_EQ(received, 0);
  EXPECT_EQ(of_other, 1);
}

}  // namespace
}  // namespace wh::sharded
