#include "parallel/parallel_run.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cmath>
#include <mutex>
#include <optional>

#include "api/machine.h"
#include "measure/useful_work.h"
#include "parallel/executor.h"
#include "parallel/link.h"
#include "plan/names.h"
#include "plan/units.h"
#include "report/session.h"
#include "verify/rank_on_device.h"

namespace wh::cli {
namespace {

using namespace sharded;
using Clock = Communicator::Clock;

// The bound that `run` has for random data.
double tolerance_for(const Problem& p) {
  const double score = std::fabs(p.scale) * std::sqrt(static_cast<double>(p.dim_qk));
  return tolerance_of(p.dtype_q) * std::max(1.0, score);
}

// The data of all ranks, which those of one process share.
class SharedData {
 public:
  const ShardedData& of(const Input& input, const ShardedProblem& problem) {
    std::call_once(once_, [&] { data_.emplace(input, problem); });
    return *data_;
  }

 private:
  std::once_flag once_;
  std::optional<ShardedData> data_;
};

// One rank's part of it, for every strategy.
struct RankData {
  RankData(const ShardedData& of, int32_t rank, int32_t device_index)
      : all(of),
        local(of.local(rank)),
        sampled(of.sampled(rank, affordable_rows(of.whole()))),
        there(RankOnDevice::make(of, local, device_index)) {}

  const ShardedData& all;
  LocalTensors local;
  SampledRows sampled;
  Result<RankOnDevice> there;
};

struct Measured {
  Strategy strategy;
  double estimated_us = 0;
  int64_t sent_bytes = 0;
  std::vector<double> us;  // sorted; of the slowest rank each time
  std::vector<uint64_t> workspace_bytes;
  double error = 0;  // of all ranks' rows

  double best() const { return us.front(); }
  double median() const { return us[us.size() / 2]; }
  Json json() const {
    return {{"strategy", kStrategies.name(strategy)},
            {"best_us", best()},
            {"median_us", median()},
            {"samples", us.size()},
            {"estimated_us", estimated_us},
            {"sent_bytes", sent_bytes},
            {"workspace_bytes", workspace_bytes},
            {"relative_rms", error}};
  }
};

class RankRunner {
 public:
  RankRunner(const ParallelRunFlags& flags, Communicator& communicator, int32_t device_index,
             SharedData& shared)
      : flags_(flags),
        request_(flags.request),
        communicator_(communicator),
        device_index_(device_index),
        shared_(shared) {
    request_.problem.device_index = device_index;
  }

  Result<int> operator()() {
    const auto sharded = read_sharded(flags_.parallel, request_, communicator_.ranks());
    if (!sharded.ok()) return sharded.status();
    const auto planner = planner_for(flags_.parallel, request_.problem);
    if (!planner.ok()) return planner.status();
    const double memory = planner->memory_gbytes_per_s;
    const Result<Link> link =
        flags_.parallel.link.empty()
            ? measure_link(communicator_, {request_.problem.device, device_index_, memory},
                           run_.timeout)
            : read_link(flags_.parallel.link, memory);
    if (!link.ok()) return link.status();
    const auto plan = make_parallel_plan(*sharded, {flags_.limits, flags_.parallel.strategy}, *link,
                                         planner->plan_one);
    if (!plan.ok()) return plan.status();
    // Estimates may differ between machines; one of them decides.
    const auto choices = of_all(static_cast<uint64_t>(plan->chosen));
    if (!choices.ok()) return choices.status();
    const auto chosen = static_cast<int32_t>(choices->front());
    if (chosen < 0) return runnable_status(*plan);
    if (is_first() && !flags_.json) fmt::print(answers(), "{}\n", explain(*plan));
    std::vector<Strategy> strategies{static_cast<Strategy>(chosen)};
    if (flags_.every_strategy) {
      strategies.clear();
      for (const StrategyCandidate& candidate : plan->candidates) {
        const bool is_allowed =
            candidate.verdict == Verdict::kChosen || candidate.verdict == Verdict::kSlower;
        if (is_allowed) strategies.push_back(candidate.strategy);
      }
    }
    const ShardedData& data = shared_.of(request_.input(flags_.seed), *sharded);
    RankData rank_data(data, communicator_.rank(), device_index_);
    std::vector<Measured> all;
    for (const Strategy strategy : strategies) {
      Result<Measured> one = measure(*plan, strategy, planner->plan_one, rank_data);
      if (!one.ok()) return one.status();
      all.push_back(std::move(*one));
    }
    if (is_first()) print(*plan, static_cast<Strategy>(chosen), all);
    for (const Measured& one : all) {
      if (!(one.error <= tolerance_for(request_.problem))) return kWrongNumbers;  // NaN too
    }
    return kFine;
  }

 private:
  bool is_first() const { return communicator_.rank() == 0; }
  Clock::time_point deadline() const { return Clock::now() + run_.timeout; }

  Result<std::vector<uint64_t>> of_all(uint64_t mine) {
    return tell_all(communicator_, std::array{mine}, deadline());
  }
  Result<double> largest(double mine) {
    const auto all = of_all(std::bit_cast<uint64_t>(mine));
    if (!all.ok()) return all.status();
    double most = mine;
    for (const uint64_t one : *all) {
      const auto theirs = std::bit_cast<double>(one);
      if (!(theirs <= most)) most = theirs;  // NaN is larger than any
    }
    return most;
  }

  Result<Measured> measure(const ParallelPlan& plan, Strategy strategy, const PlanOne& plan_one,
                           RankData& data) {
    const int32_t rank = communicator_.rank();
    Result<RankOnDevice>& there = data.there;
    const StrategyCandidate& candidate = plan.candidates[static_cast<size_t>(strategy)];
    const auto mine = make_rank_plan(plan.problem, strategy, rank, flags_.limits, plan_one);
    Status own = mine.status();
    if (own.ok()) own = there.status();
    if (own.ok()) own = there->take_workspace(mine->workspace_bytes);
    if (own.ok()) own = there->poison(data.sampled);  // what the strategy before it left
    WH_RETURN_IF_ERROR(agree(plan.problem, strategy, own, communicator_, run_));
    const auto bytes = of_all(mine->workspace_bytes);
    if (!bytes.ok()) return bytes.status();
    auto us = time(plan.problem, *mine, there->tensors(), candidate.estimated_us);
    if (!us.ok()) return us.status();
    WH_RETURN_IF_ERROR(there->fetch(data.sampled));
    const auto error = largest(data.all.relative_rms_of(rank, data.local, data.sampled));
    if (!error.ok()) return error.status();
    return Measured{strategy, candidate.estimated_us, candidate.sent_bytes, std::move(*us), *bytes,
                    *error};
  }

  Result<std::vector<double>> time(const ShardedProblem& problem, const RankPlan& plan,
                                   const Tensors& tensors, double estimated_us) {
    // Of short ones several: ranks do not begin in the same microsecond.
    const int runs = estimated_us < 1000 ? 20 : 1;
    // Devices that nobody else is on need fewer.
    const bool is_host = backend(problem.whole.device).is_host();
    const size_t least = is_host ? 4 : 3;
    const double enough_us = is_host ? 5e6 : 1e6;
    std::vector<double> samples;
    for (double total_us = 0;
         samples.size() < least || (samples.size() < 10 && total_us < enough_us);) {
      if (const auto here = of_all(0); !here.ok()) return here.status();
      const auto begin = Clock::now();
      for (int i = 0; i < runs; ++i) {
        WH_RETURN_IF_ERROR(run_rank(problem, plan, tensors, communicator_, run_));
      }
      WH_RETURN_IF_ERROR(communicator_.settle(deadline()));
      const std::chrono::duration<double, std::micro> took = Clock::now() - begin;
      const auto slowest = largest(took.count() / runs);
      if (!slowest.ok()) return slowest.status();
      samples.push_back(*slowest);
      total_us += *slowest * runs;
    }
    samples.erase(samples.begin());  // the first one loads code and touches memory
    std::sort(samples.begin(), samples.end());
    return samples;
  }

  void print(const ParallelPlan& plan, Strategy chosen, const std::vector<Measured>& all) const {
    const Problem& p = plan.problem.whole;
    const double tolerance = tolerance_for(p);
    if (flags_.json) {
      Json document{{"problem", describe(p)},
                    {"transport", kTransports.name(flags_.transport)},
                    {"ranks", plan.problem.ranks()},
                    {"link_gbytes_per_s", plan.link.gbytes_per_s},
                    {"link_latency_us", plan.link.latency_us},
                    {"one_device_estimated_us", plan.alone_us},
                    {"tolerance", tolerance}};
      if (flags_.every_strategy) {
        document["chosen"] = kStrategies.name(chosen);
        for (const Measured& one : all) document["strategies"].push_back(one.json());
      } else {
        document.update(all.front().json());
      }
      fmt::print(answers(), "{}\n", document.dump(2));
      return;
    }
    for (const Measured& one : all) {
      if (flags_.every_strategy)
        fmt::print(answers(), "\nstrategy   {}\n", kStrategies.name(one.strategy));
      fmt::print(answers(), "time       {} best, {} median of {}\n", format_us(one.best()),
                 format_us(one.median()), one.us.size());
      fmt::print(answers(), "rate       {:.0f} GFLOP/s on visible pairs\n",
                 useful_flops(request_) / one.best() * 1e-3);
      fmt::print(
          answers(),
          "out        {} float64 on every rank: relative RMS error {:.2e}, at most {:.2g} is "
          "right\n",
          one.error <= tolerance ? "agrees with" : "DIFFERS from", one.error, tolerance);
    }
  }

  const ParallelRunFlags& flags_;
  Request request_;
  Communicator& communicator_;
  int32_t device_index_;
  SharedData& shared_;
  const ParallelRun run_;
};

}  // namespace

int run_parallel(const ParallelRunFlags& flags) {
  const Problem& p = flags.request.problem;
  SharedData shared;
  return run_ranks({flags.transport, flags.parallel.ranks, p.device, p.device_index},
                   [&](Communicator& communicator, int32_t device_index) {
                     return RankRunner(flags, communicator, device_index, shared)();
                   });
}

}  // namespace wh::cli
