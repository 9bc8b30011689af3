// Attention over the GPUs of one host, a thread for each, against float64 and against one of them.
// What needs no GPU runs without; the rest is skipped where there are none, and takes 1, 2, 4 and 8
// of them as far as there are.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <thread>

#include "api/machine.h"
#include "api/workspace.h"
#include "cuda/device.h"
#include "parallel/executor.h"
#include "parallel/nccl/communicator.h"
#include "parallel/nccl/devices.h"
#include "support/hanging_tests.h"
#include "support/sharded_case.h"
#include "verify/execution.h"
#include "verify/rank_on_device.h"

namespace wh::sharded {
namespace {

TEST(Nccl, HasEveryFunctionThatIsCalled) {
  const Result<const Nccl*> library = nccl();
  ASSERT_TRUE(library.ok()) << library.status().message();
  int version = 0;
  EXPECT_EQ((*library)->get_version(&version), ncclSuccess);
  EXPECT_GE(version, 20700);
  const std::string words = (*library)->error_string(ncclInvalidArgument);
  EXPECT_EQ(words.rfind("invalid argument", 0), 0u) << words;
}

// Three ranks of which the second answers with an error: none is left over.
TEST(Nccl, AFailureOfOneRankLeavesNone) {
  static std::vector<ncclComm_t> aborted;
  aborted.clear();
  static int one, two, three;
  const auto as_comm = [](int& address) { return reinterpret_cast<ncclComm_t>(&address); };
  const ncclComm_t comms[] = {as_comm(one), as_comm(two), as_comm(three)};
  Nccl f{};
  f.user_rank = [](ncclComm_t, int*) { return ncclSuccess; };
  f.count = [](ncclComm_t comm, int*) {
    return comm == reinterpret_cast<ncclComm_t>(&two) ? ncclSystemError : ncclSuccess;
  };
  f.device = [](ncclComm_t, int*) { return ncclSuccess; };
  f.error_string = [](ncclResult_t) { return "unhandled system error"; };
  f.last_error = [](ncclComm_t) { return "no such device"; };
  f.abort = [](ncclComm_t comm) {
    aborted.push_back(comm);
    return ncclSuccess;
  };
  const auto all = NcclConnection::make_all(f, comms);
  EXPECT_EQ(all.status().message(),
            "ncclCommCount on rank 0: unhandled system error (no such device)");
  EXPECT_EQ(aborted, std::vector<ncclComm_t>(std::begin(comms), std::end(comms)));
}

Result<Plan> plan_on_gpu(const Problem& problem, const Limits& limits) {
  return make_plan(problem, limits, this_machine(Device::kCuda, problem.device_index));
}

using namespace std::chrono_literals;

Communicator::Clock::time_point in(Communicator::Clock::duration time) {
  return Communicator::Clock::now() + time;
}

using RankMain = std::function<Status(Communicator&, int32_t rank)>;

// Of so many ranks, made once: it takes most of a second. Gone once a rank failed, which leaves its
// connection of no more use.
using Group = std::unique_ptr<NcclDevices>;
class Groups : public testing::Environment {
 public:
  Group& of(int32_t ranks) { return groups_[ranks]; }
  void TearDown() override { groups_.clear(); }

 private:
  std::map<int32_t, Group> groups_;
};
Groups& groups = *static_cast<Groups*>(testing::AddGlobalTestEnvironment(new Groups));
[[maybe_unused]] const bool is_watched = end_hanging_tests(std::chrono::seconds(60));

// main() as each rank; what each answered. `connect`: the rank's communicator. They are made and go
// where no rank runs: of ranks that share a process one that allocates or frees may wait for the
// messages of another.
using Connect = std::function<Result<std::unique_ptr<Communicator>>(NcclDevices&, int32_t rank)>;
std::vector<Status> as_ranks(int32_t ranks, const RankMain& main, const Connect& connect) {
  std::vector<Status> statuses(static_cast<size_t>(ranks));
  const auto all_answer = [&](const Status& status) {
    return std::vector<Status>(static_cast<size_t>(ranks), status);
  };
  Group& group = groups.of(ranks);
  if (group == nullptr) {
    auto made = NcclDevices::make(ranks);
    if (!made.ok()) return all_answer(made.status());
    group = std::move(*made);
  }
  std::vector<std::unique_ptr<Communicator>> communicators;
  for (int32_t rank = 0; rank < ranks; ++rank) {
    auto communicator = connect(*group, rank);
    if (!communicator.ok()) return all_answer(communicator.status());
    communicators.push_back(std::move(*communicator));
  }
  std::vector<std::thread> threads;
  for (int32_t rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      const cuda::DeviceScope scope(rank);
      const auto i = static_cast<size_t>(rank);
      statuses[i] = main(*communicators[i], rank);
    });
  }
  for (std::thread& thread : threads) thread.join();
  const auto is_ok = [](const Status& status) { return status.ok(); };
  const bool is_fine = std::all_of(statuses.begin(), statuses.end(), is_ok);
  if (!is_fine) group->abort();
  communicators.clear();
  if (!is_fine) group.reset();
  return statuses;
}
// As the command line connects them.
std::vector<Status> of_threads(int32_t ranks, const RankMain& main) {
  return as_ranks(ranks, main, [](NcclDevices& devices, int32_t rank) {
    return devices.communicator(rank, nullptr);
  });
}
// As processes do, which share no memory: words of the host go by NCCL too.
std::vector<Status> as_processes(int32_t ranks, const RankMain& main) {
  return as_ranks(ranks, main,
                  [](NcclDevices& devices, int32_t rank) -> Result<std::unique_ptr<Communicator>> {
                    auto made = NcclCommunicator::make(devices.connection(rank), nullptr);
                    if (!made.ok()) return made.status();
                    return std::unique_ptr<Communicator>(std::move(*made));
                  });
}

ShardedProblem on_device(ShardedProblem problem, int32_t rank) {
  problem.whole.device_index = rank;
  return problem;
}

Status run_one(const ShardedData& data, Strategy strategy, Communicator& communicator,
               LocalTensors& local) {
  const int32_t rank = communicator.rank();
  const ShardedProblem s = on_device(data.problem(), rank);
  Result<RankOnDevice> there = RankOnDevice::make(data, local, rank);
  Status own = there.status();
  const Result<RankPlan> plan = make_rank_plan(s, strategy, rank, {}, plan_on_gpu);
  if (own.ok()) own = plan.status();
  if (own.ok()) own = there->take_workspace(plan->workspace_bytes);
  WH_RETURN_IF_ERROR(agree(s, strategy, own, communicator, {}));
  WH_RETURN_IF_ERROR(run_rank(s, *plan, there->tensors(), communicator, {}));
  WH_RETURN_IF_ERROR(communicator.settle(in(30s)));
  return there->fetch();
}

std::vector<Status> run_all(ShardedData& data, Strategy strategy,
                            std::vector<LocalTensors>& locals) {
  const int32_t ranks = data.problem().ranks();
  locals.clear();
  for (int32_t r = 0; r < ranks; ++r) locals.push_back(data.local(r));
  const auto statuses = of_threads(ranks, [&](Communicator& communicator, int32_t rank) {
    return run_one(data, strategy, communicator, locals[static_cast<size_t>(rank)]);
  });
  data.poison();
  for (int32_t r = 0; r < ranks; ++r) data.put(r, locals[static_cast<size_t>(r)]);
  return statuses;
}

class ParallelNccl : public testing::TestWithParam<Strategy> {
 protected:
  void SetUp() override {
    const std::string& reason = backend(Device::kCuda).facts(0).unavailable;
    if (!reason.empty()) GTEST_SKIP() << reason;
    ASSERT_EQ(cudaGetDeviceCount(&devices_), cudaSuccess);
  }
  std::vector<int32_t> group_sizes() const {
    std::vector<int32_t> sizes;
    for (int32_t ranks = 1; ranks <= std::min(8, devices_); ranks *= 2) sizes.push_back(ranks);
    return sizes;
  }

  int devices_ = 0;
};

TEST_P(ParallelNccl, IsTheWholeInFloat64AndOnOneDevice) {
  for (const int32_t ranks : group_sizes()) {
    for (uint64_t seed = 3000; seed < 3032; ++seed) {
      const CaseDims dims = seed % 2 == 0 ? CaseDims::kSmall : CaseDims::kOfModels;
      const CaseKeys keys = seed < 3024 ? CaseKeys::kDense : CaseKeys::kPaged;
      ShardedData data = random_case(ranks, seed, Device::kCuda, dims, keys);
      SCOPED_TRACE(std::to_string(seed) + ", " + std::to_string(ranks) +
                   " ranks: " + describe(data.problem().whole));
      if (!refusal(data.problem(), GetParam()).empty()) continue;
      std::vector<LocalTensors> locals;
      for (const Status& status : run_all(data, GetParam(), locals)) {
        ASSERT_TRUE(status.ok()) << status.message();
      }
      EXPECT_EQ(data.difference(), "");
      const std::vector<std::byte> parallel = data.out();
      const Result<Plan> plan = plan_on_gpu(data.whole(), {});
      ASSERT_TRUE(plan.ok());
      Result<Execution> alone = Execution::prepare(*plan, data.whole_tensors());
      ASSERT_TRUE(alone.ok()) << alone.status().message();
      ASSERT_TRUE(alone->run().ok());
      ASSERT_TRUE(alone->fetch_outputs().ok());
      EXPECT_EQ(data.disagreement_with(parallel), "");
    }
  }
}

TEST_P(ParallelNccl, IsTheSameBitsEveryTime) {
  for (const int32_t ranks : group_sizes()) {
    ShardedData data = random_case(ranks, 12, Device::kCuda, CaseDims::kOfModels);
    if (!refusal(data.problem(), GetParam()).empty()) continue;
    std::vector<LocalTensors> first, again;
    for (const Status& status : run_all(data, GetParam(), first)) ASSERT_TRUE(status.ok());
    for (int i = 0; i < 5; ++i) {
      for (const Status& status : run_all(data, GetParam(), again)) ASSERT_TRUE(status.ok());
      for (size_t r = 0; r < first.size(); ++r) EXPECT_EQ(first[r].out, again[r].out);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Strategies, ParallelNccl,
                         testing::Values(Strategy::kRing, Strategy::kGather, Strategy::kHeads,
                                         Strategy::kQueries, Strategy::kOneRank),
                         [](const auto& info) {
                           return std::string(kStrategies.name(info.param));
                         });

class ParallelNcclGroup : public ParallelNccl {};

TEST_P(ParallelNcclGroup, WordsOfTheHostReachEveryRank) {
  for (const int32_t ranks : group_sizes()) {
    const auto statuses = as_processes(ranks, [&](Communicator& communicator, int32_t rank) {
      for (uint64_t count = 1; count < 3000; count *= 7) {
        const std::vector<uint64_t> mine(count, static_cast<uint64_t>(rank) + count);
        const auto all = tell_all(communicator, mine, in(10s));
        if (!all.ok()) return all.status();
        for (size_t i = 0; i < all->size(); ++i) EXPECT_EQ((*all)[i], i / count + count);
      }
      return Status();
    });
    for (const Status& status : statuses) EXPECT_TRUE(status.ok()) << status.message();
  }
}

TEST_P(ParallelNcclGroup, DisagreementEndsOnEveryRank) {
  if (devices_ < 2) GTEST_SKIP() << "takes two GPUs";
  ShardedProblem s = random_case(2, 1, Device::kCuda).problem();
  s.whole.window_left = -1;
  for (const auto& as : {as_processes, of_threads}) {
    const auto statuses = as(2, [&](Communicator& communicator, int32_t rank) {
      ShardedProblem mine = on_device(s, rank);
      if (rank == 1) mine.whole.window_left = 7;
      return agree(mine, GetParam(), {}, communicator, {});
    });
    for (const Status& status : statuses) {
      EXPECT_EQ(status.message(),
                "window_left is 7 on rank 1 and -1 on rank 0; all ranks must agree");
    }
  }
}

// Nobody answers what the host is told.
TEST_P(ParallelNcclGroup, AbsenceEndsOnTheRankThatWaits) {
  if (devices_ < 2) GTEST_SKIP() << "takes two GPUs";
  const ShardedProblem s = random_case(2, 1, Device::kCuda).problem();
  ParallelRun run;
  run.timeout = 500ms;
  const auto alone = as_processes(2, [&](Communicator& communicator, int32_t rank) {
    if (rank == 1) return Status();
    return agree(on_device(s, rank), GetParam(), {}, communicator, run);
  });
  EXPECT_NE(alone[0].message().find("rank 0 waited in vain"), std::string::npos)
      << alone[0].message();
  EXPECT_TRUE(alone[1].ok()) << alone[1].message();
}

// A message between devices that one rank has started alone: the rank may free its memory as soon
// as it has heard, and who waits for something else hears of it long before its own time-out.
TEST_P(ParallelNcclGroup, AFailureEndsTheMessagesOfEveryRank) {
  if (devices_ < 2) GTEST_SKIP() << "takes two GPUs";
  const auto begin = Communicator::Clock::now();
  const auto statuses = of_threads(2, [&](Communicator& communicator, int32_t rank) {
    auto memory = Workspace::allocate({Device::kCuda, {rank, nullptr}}, 1 << 20);
    if (!memory.ok()) return memory.status();
    // Nobody allocates any more.
    if (const auto here = tell_all(communicator, std::array{uint64_t{}}, in(10s)); !here.ok()) {
      return here.status();
    }
    // Either waits for what the other will never send.
    const Communicator::Transfer one[] = {{1 - rank, false, memory->data(), 1 << 20}};
    WH_RETURN_IF_ERROR(communicator.start(0, one));
    WH_RETURN_IF_ERROR(communicator.finish(0, in(30s)));
    return communicator.settle(rank == 0 ? in(500ms) : in(30s));
  });
  EXPECT_NE(statuses[0].message().find("rank 0 waited in vain"), std::string::npos)
      << statuses[0].message();
  EXPECT_NE(statuses[1].message().find("rank 1 has no connection any more"), std::string::npos)
      << statuses[1].message();
  EXPECT_LT(Communicator::Clock::now() - begin, 20s);
}

INSTANTIATE_TEST_SUITE_P(Ring, ParallelNcclGroup, testing::Values(Strategy::kRing));

}  // namespace
}  // namespace wh::sharded
