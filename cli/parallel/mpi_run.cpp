#include "parallel/mpi_run.h"

#include <fmt/format.h>
#include <mpi.h>

#include <algorithm>
#include <cmath>
#include <new>

#include "api/machine.h"
#include "api/workspace.h"
#include "measure/useful_work.h"
#include "parallel/executor.h"
#include "parallel/mpi/communicator.h"
#include "plan/units.h"
#include "report/session.h"
#include "verify/sharded_data.h"

namespace wh::cli {
namespace {

using namespace sharded;

// MPI for as long as this lives.
class Session {
 public:
  Session() { MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &level_); }
  ~Session() { MPI_Finalize(); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

 private:
  int level_ = 0;
};

double largest(double value) {
  MPI_Allreduce(MPI_IN_PLACE, &value, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
  return value;
}

// Between neighbours, both ways at once, as a ring uses it.
Link measured_link(int32_t rank, int32_t ranks, double memory_gbytes_per_s) {
  Link link{1, 0, memory_gbytes_per_s};
  if (ranks == 1) return link;
  std::vector<std::byte> out(8 << 20), in(out.size());
  const auto us = [&](int bytes) {
    double best = INFINITY;
    for (int i = 0; i < 20; ++i) {
      MPI_Barrier(MPI_COMM_WORLD);
      const double begin = MPI_Wtime();
      MPI_Sendrecv(out.data(), bytes, MPI_BYTE, (rank + 1) % ranks, 0, in.data(), bytes, MPI_BYTE,
                   (rank - 1 + ranks) % ranks, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
      best = std::min(best, (MPI_Wtime() - begin) * 1e6);
    }
    return largest(best);
  };
  link.latency_us = us(1);
  const auto bytes = static_cast<int>(out.size());
  link.gbytes_per_s = bytes / std::max(1.0, us(bytes)) * 1e-3;
  return link;
}

// The bound that `run` has for random data.
double tolerance_for(const Problem& p) {
  const double score = std::fabs(p.scale) * std::sqrt(static_cast<double>(p.dim_qk));
  return tolerance_of(p.dtype_q) * std::max(1.0, score);
}

class RankRunner {
 public:
  explicit RankRunner(const MpiRun& run) : run_(run), communicator_(MPI_COMM_WORLD) {}

  Result<int> operator()() {
    const int32_t rank = communicator_.rank(), ranks = communicator_.ranks();
    const auto sharded = read_sharded(run_.flags, run_.request, ranks);
    if (!sharded.ok()) return sharded.status();
    const auto planner = planner_for(run_.flags, run_.request.problem);
    if (!planner.ok()) return planner.status();
    Result<Link> link = run_.flags.link.empty()
                            ? measured_link(rank, ranks, planner->memory_gbytes_per_s)
                            : read_link(run_.flags.link, planner->memory_gbytes_per_s);
    if (!link.ok()) return link.status();
    ParallelLimits limits{run_.limits, run_.flags.strategy};
    const Result<ParallelPlan> plan =
        make_parallel_plan(*sharded, limits, *link, planner->plan_one);
    if (!plan.ok()) return plan.status();
    // Estimates may differ between machines; one of them decides.
    int32_t chosen = plan->chosen;
    MPI_Bcast(&chosen, 1, MPI_INT32_T, 0, MPI_COMM_WORLD);
    if (chosen < 0) return runnable_status(*plan);
    if (rank == 0 && !run_.json) fmt::print("{}\n", explain(*plan));
    return run_as(*plan, static_cast<Strategy>(chosen), planner->plan_one);
  }

 private:
  Result<int> run_as(const ParallelPlan& plan, Strategy strategy, const PlanOne& plan_one) {
    const int32_t rank = communicator_.rank();
    const Problem& p = plan.problem.whole;
    ShardedData data(run_.request.input(run_.seed), plan.problem);
    LocalTensors local = data.local(rank);
    Tensors tensors = data.tensors(local);
    const auto mine = make_rank_plan(plan.problem, strategy, rank, run_.limits, plan_one);
    Status own = mine.status();
    Result<Workspace> workspace =
        Workspace::allocate({p.device, {}}, mine.ok() ? mine->workspace_bytes : 0);
    if (own.ok() && !workspace.ok()) own = workspace.status();
    const ParallelRun run;
    WH_RETURN_IF_ERROR(agree(plan.problem, strategy, own, communicator_, run));
    tensors.workspace = workspace->data();
    tensors.workspace_bytes = mine->workspace_bytes;
    std::vector<double> samples;
    for (double total_us = 0; samples.size() < 3 || (samples.size() < 9 && total_us < 5e6);) {
      MPI_Barrier(MPI_COMM_WORLD);
      const double begin = MPI_Wtime();
      WH_RETURN_IF_ERROR(run_rank(plan.problem, *mine, tensors, communicator_, run));
      samples.push_back(largest((MPI_Wtime() - begin) * 1e6));
      total_us += samples.back();
    }
    std::sort(samples.begin(), samples.end());
    const double error = largest(data.relative_rms_of(rank, local, affordable_rows(p)));
    const bool is_right = error <= tolerance_for(p);
    std::vector<uint64_t> bytes(static_cast<size_t>(communicator_.ranks()));
    const uint64_t own_bytes = mine->workspace_bytes;
    MPI_Allgather(&own_bytes, 1, MPI_UINT64_T, bytes.data(), 1, MPI_UINT64_T, MPI_COMM_WORLD);
    if (rank == 0) print(plan, strategy, samples, bytes, error, is_right);
    return is_right ? kFine : kWrongNumbers;
  }

  void print(const ParallelPlan& plan, Strategy strategy, const std::vector<double>& samples,
             const std::vector<uint64_t>& bytes, double error, bool is_right) const {
    const Problem& p = plan.problem.whole;
    const double best = samples.front(), median = samples[samples.size() / 2];
    const double estimated = plan.candidates[static_cast<size_t>(strategy)].estimated_us;
    if (run_.json) {
      const Json document{{"problem", describe(p)},
                          {"ranks", plan.problem.ranks()},
                          {"strategy", kStrategies.name(strategy)},
                          {"link_gbytes_per_s", plan.link.gbytes_per_s},
                          {"link_latency_us", plan.link.latency_us},
                          {"best_us", best},
                          {"median_us", median},
                          {"samples", samples.size()},
                          {"estimated_us", estimated},
                          {"workspace_bytes", bytes},
                          {"relative_rms", error}};
      fmt::print("{}\n", document.dump(2));
      return;
    }
    fmt::print("time       {} best, {} median of {}\n", format_us(best), format_us(median),
               samples.size());
    fmt::print("rate       {:.0f} GFLOP/s on visible pairs\n",
               useful_flops(run_.request) / best * 1e-3);
    fmt::print(
        "out        {} float64 on every rank: relative RMS error {:.2e}, at most {:.2g} is "
        "right\n",
        is_right ? "agrees with" : "DIFFERS from", error, tolerance_for(p));
  }

  const MpiRun& run_;
  MpiCommunicator communicator_;
};

}  // namespace

int run_over_mpi(const MpiRun& run) {
  const Session session;
  Result<int> code = kFine;
  try {
    code = RankRunner(run)();
  } catch (const std::bad_alloc&) {
    code = Status(Code::kOutOfMemory, "not enough memory");
  }
  if (code.ok()) return *code;
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  const Status& status = code.status();
  const int answer = report({status.code(), fmt::format("rank {}: {}", rank, status.message())});
  // Ranks that wait for this one would wait for good: what failed here may not have failed there.
  if (status.code() != Code::kInvalidArgument && status.code() != Code::kRefused) {
    MPI_Abort(MPI_COMM_WORLD, answer);
  }
  return answer;
}

}  // namespace wh::cli
