// Attention over the ranks of MPI, against float64. Every rank makes the same cases, and compares
// its own rows. Started by mpirun, on more ranks than cores too.
#include <gtest/gtest.h>
#include <mpi.h>

#include "api/machine.h"
#include "parallel/executor.h"
#include "parallel/mpi/communicator.h"
#include "support/sharded_case.h"

namespace wh::sharded {
namespace {

Result<Plan> plan_on_cpu(const Problem& problem, const Limits& limits) {
  return make_plan(problem, limits, this_machine(Device::kCpu, 0));
}

int ranks() {
  int count = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &count);
  return count;
}

// What a failure leaves of no more use.
MPI_Comm passing_comm() {
  MPI_Comm comm = MPI_COMM_NULL;
  EXPECT_EQ(MPI_Comm_dup(MPI_COMM_WORLD, &comm), MPI_SUCCESS);
  return comm;
}

// 64 tokens, evenly.
Problem tiny() {
  Problem p;
  p.len_q = p.len_k = 64;
  p.dim_qk = p.dim_v = 16;
  set_dense(p);
  return p;
}
ShardedProblem shared_by_all(const Problem& p) {
  return shard(p, contiguous(p.len_q, ranks()), contiguous(p.len_k, ranks()));
}

// This rank's part, its rows against float64.
void expect_right_rows(ShardedData& sharded, Strategy strategy) {
  const ShardedProblem& s = sharded.problem();
  MpiCommunicator communicator(MPI_COMM_WORLD);
  const int32_t rank = communicator.rank();
  Limits limits;
  limits.threads = 1;
  const Result<RankPlan> plan = make_rank_plan(s, strategy, rank, limits, plan_on_cpu);
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  LocalTensors local = sharded.local(rank);
  Tensors tensors = sharded.tensors(local);
  GuardedTensor workspace(static_cast<int64_t>(plan->workspace_bytes));
  tensors.workspace = workspace.data();
  tensors.workspace_bytes = plan->workspace_bytes;
  const ParallelRun run;
  Status status = agree(s, strategy, {}, communicator, run);
  ASSERT_TRUE(status.ok()) << status.message();
  status = run_rank(s, *plan, tensors, communicator, run);
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_TRUE(workspace.guards_intact());
  EXPECT_EQ(sharded.difference_of(rank, local), "") << "rank " << rank;
}

class ParallelMpi : public testing::TestWithParam<Strategy> {};

TEST_P(ParallelMpi, IsTheWholeInFloat64) {
  for (uint64_t seed = 1000; seed < 1060; ++seed) {
    ShardedData sharded = random_case(ranks(), seed);
    SCOPED_TRACE(std::to_string(seed) + ": " + describe(sharded.whole()));
    if (!refusal(sharded.problem(), GetParam()).empty()) continue;
    expect_right_rows(sharded, GetParam());
    if (HasFatalFailure()) return;
  }
}

TEST(ParallelMpiPages, AreTheWholeInFloat64) {
  for (uint64_t seed = 1000; seed < 1060; ++seed) {
    ShardedData sharded =
        random_case(ranks(), seed, Device::kCpu, CaseDims::kSmall, CaseKeys::kPaged);
    SCOPED_TRACE(std::to_string(seed) + ": " + describe(sharded.problem().whole));
    expect_right_rows(sharded, Strategy::kQueries);
    if (testing::Test::HasFatalFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Strategies, ParallelMpi,
                         testing::Values(Strategy::kRing, Strategy::kGather, Strategy::kHeads,
                                         Strategy::kQueries, Strategy::kOneRank),
                         [](const auto& info) {
                           return std::string(kStrategies.name(info.param));
                         });

// One rank asks for something else: every rank is told by whom.
TEST(ParallelMpi, DisagreementIsAnErrorOnEveryRank) {
  if (ranks() == 1) GTEST_SKIP() << "takes two ranks";
  MpiCommunicator communicator(MPI_COMM_WORLD);
  Problem p = tiny();
  p.softcap = communicator.rank() == 1 ? 3.0f : 0;
  const ShardedProblem s = shared_by_all(p);
  const Status status = agree(s, Strategy::kRing, {}, communicator, {});
  EXPECT_EQ(status.message(), "softcap of rank 1 is not that of rank 0; all ranks must agree");
}

TEST(ParallelMpi, ARankThatCannotTakePartIsAnErrorOnEveryRank) {
  if (ranks() == 1) GTEST_SKIP() << "takes two ranks";
  MpiCommunicator communicator(MPI_COMM_WORLD);
  const ShardedProblem s = shared_by_all(tiny());
  Status own;
  if (communicator.rank() == 1) own = {Code::kOutOfMemory, "no memory"};
  const Status status = agree(s, Strategy::kRing, own, communicator, {});
  EXPECT_EQ(status.code(), Code::kOutOfMemory);
  EXPECT_EQ(status.message(), communicator.rank() == 1
                                  ? "no memory"
                                  : "rank 1 cannot take part; its own error says why");
}

// The last rank fails once all have agreed: the others hear of it long before their time-out.
TEST(ParallelMpi, AFailureOnTheWayIsAnErrorOnEveryRank) {
  if (ranks() == 1) GTEST_SKIP() << "takes two ranks";
  {
    MpiCommunicator communicator(passing_comm());
    Input input;
    input.problem = tiny();
    ShardedData data(input, shared_by_all(input.problem));
    const int32_t rank = communicator.rank();
    LocalTensors local = data.local(rank);
    Tensors tensors = data.tensors(local);
    const auto plan = make_rank_plan(data.problem(), Strategy::kGather, rank, {}, plan_on_cpu);
    ASSERT_TRUE(plan.ok());
    GuardedTensor workspace(static_cast<int64_t>(plan->workspace_bytes));
    const bool is_last = rank + 1 == ranks();
    tensors.workspace = is_last ? nullptr : workspace.data();
    tensors.workspace_bytes = plan->workspace_bytes;
    ParallelRun run;
    run.timeout = std::chrono::seconds(60);
    ASSERT_TRUE(agree(data.problem(), Strategy::kGather, {}, communicator, {}).ok());
    const auto begin = Communicator::Clock::now();
    const Status status = run_rank(data.problem(), *plan, tensors, communicator, run);
    EXPECT_LT(Communicator::Clock::now() - begin, std::chrono::seconds(30));
    const std::string named = is_last ? "workspace is null" : gave_up(ranks() - 1).message();
    EXPECT_EQ(status.message().rfind(named, 0), 0u) << status.message();
    EXPECT_EQ(communicator.start(0, {}).message(), gave_up(ranks() - 1).message());
  }
  MPI_Barrier(MPI_COMM_WORLD);
}

// Memory is the caller's again at once, not when the communicator goes.
TEST(ParallelMpi, WhoGivesUpReceivesNothingMore) {
  if (ranks() == 1) GTEST_SKIP() << "takes two ranks";
  {
    const MPI_Comm comm = passing_comm();
    MpiCommunicator communicator(comm);
    const int32_t rank = communicator.rank();
    int32_t number = rank;
    if (rank == 1) {
      const Communicator::Transfer from_first[] = {{0, false, &number, sizeof(number)}};
      ASSERT_TRUE(communicator.start(0, from_first).ok());
      communicator.give_up();
    }
    MPI_Barrier(MPI_COMM_WORLD);
    if (rank == 0) MPI_Send(&number, sizeof(number), MPI_BYTE, 1, 0x7764, comm);
    MPI_Barrier(MPI_COMM_WORLD);
    EXPECT_EQ(number, rank);
  }
  MPI_Barrier(MPI_COMM_WORLD);
}

// The last rank never comes: the others stop waiting.
TEST(ParallelMpi, AbsenceIsATimeOut) {
  if (ranks() == 1) GTEST_SKIP() << "takes two ranks";
  {
    MpiCommunicator communicator(passing_comm());
    const ShardedProblem s = shared_by_all(tiny());
    ParallelRun run;
    run.timeout = std::chrono::milliseconds(300);
    if (communicator.rank() + 1 < ranks()) {
      const Status status = agree(s, Strategy::kRing, {}, communicator, run);
      EXPECT_EQ(status.code(), Code::kDeviceError);
      EXPECT_NE(status.message().find("rank " + std::to_string(ranks() - 1) + " did not"),
                std::string::npos)
          << status.message();
    }
  }
  MPI_Barrier(MPI_COMM_WORLD);
}

}  // namespace
}  // namespace wh::sharded

int main(int argc, char** argv) {
  int level = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_SERIALIZED, &level);
  testing::InitGoogleTest(&argc, argv);
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  if (rank > 0) {
    // One report is enough, but for failures.
    auto& listeners = testing::UnitTest::GetInstance()->listeners();
    class Failures : public testing::EmptyTestEventListener {
      void OnTestPartResult(const testing::TestPartResult& result) override {
        if (result.failed()) std::fprintf(stderr, "%s\n", result.message());
      }
    };
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new Failures);
  }
  const int code = RUN_ALL_TESTS();
  int worst = code;
  MPI_Allreduce(&code, &worst, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
  MPI_Finalize();
  return worst;
}
