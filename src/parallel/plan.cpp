#include "parallel/plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "core/carver.h"
#include "core/nearest_name.h"
#include "plan/names.h"
#include "plan/units.h"

namespace wh::sharded {
namespace {

// Plans by problem: the ranks of a group ask for few shapes, each of them often.
class Plans {
 public:
  explicit Plans(const PlanOne& plan_one) : plan_one_(plan_one) {}

  Result<std::shared_ptr<const Plan>> of(const Problem& problem, const Limits& limits) {
    const auto found = std::find_if(plans_.rbegin(), plans_.rend(), [&](const auto& plan) {
      return plan->limits == limits && plan->problem == problem;
    });
    if (found != plans_.rend()) return *found;
    Result<Plan> made = plan_one_(problem, limits);
    if (!made.ok()) return made.status();
    plans_.push_back(std::make_shared<const Plan>(std::move(*made)));
    return plans_.back();
  }

 private:
  const PlanOne& plan_one_;
  std::vector<std::shared_ptr<const Plan>> plans_;
};

Status cannot(const Plan& plan) {
  std::string reasons;
  for (const Candidate& candidate : plan.candidates) {
    reasons +=
        fmt::format("{}{}: {}", reasons.empty() ? "" : "; ", candidate.kernel, candidate.reason);
  }
  return {Code::kRefused, fmt::format("no kernel takes {}: {}", describe(plan.problem), reasons)};
}

Result<RankPlan> rank_plan(const ShardedProblem& s, Strategy strategy, int32_t rank,
                           const Limits& limits, Plans& plans) {
  RankPlan made;
  made.schedule = make_schedule(s, strategy, rank);
  Carver carver(nullptr);
  for (const int64_t bytes : made.schedule.buffers) {
    made.offsets.push_back(carver.aligned_end());
    carver.take<std::byte>(bytes);
  }
  made.kernel_offset = carver.aligned_end();
  made.workspace_bytes = carver.bytes();
  Limits of_kernel = limits;
  if (limits.workspace_bytes != kNoByteLimit) {
    if (made.workspace_bytes > limits.workspace_bytes) {
      return Status(Code::kOutOfMemory,
                    fmt::format("wants {} of buffers on rank {}, the limit is {}",
                                format_bytes(made.workspace_bytes), rank,
                                format_bytes(limits.workspace_bytes)));
    }
    of_kernel.workspace_bytes -= std::min<uint64_t>(made.kernel_offset, limits.workspace_bytes);
  }
  for (Step& step : made.schedule.steps) {
    auto* attend = std::get_if<Attend>(&step);
    if (attend == nullptr) continue;
    const auto plan = plans.of(attend->problem, of_kernel);
    if (!plan.ok()) return plan.status();
    if (!(*plan)->runnable()) return cannot(**plan);
    const auto known = std::find(made.plans.begin(), made.plans.end(), *plan);
    attend->plan = static_cast<int32_t>(known - made.plans.begin());
    if (known == made.plans.end()) made.plans.push_back(*plan);
    if ((*plan)->workspace_bytes > 0) {
      made.workspace_bytes =
          std::max<size_t>(made.workspace_bytes, made.kernel_offset + (*plan)->workspace_bytes);
    }
  }
  return made;
}

StrategyCandidate assess(const ShardedProblem& s, Strategy strategy, const ParallelLimits& limits,
                         const Link& link, Plans& plans) {
  StrategyCandidate candidate{strategy, Verdict::kRefused, refusal(s, strategy), 0, {}, 0, {}};
  if (candidate.reason.empty() && !limits.strategy.empty() &&
      limits.strategy != kStrategies.name(strategy)) {
    candidate.reason = fmt::format("the caller forces {}", limits.strategy);
  }
  if (!candidate.reason.empty()) return candidate;
  std::vector<RankPlan> ranks;
  for (int32_t rank = 0; rank < s.ranks(); ++rank) {
    Result<RankPlan> made = rank_plan(s, strategy, rank, limits.each, plans);
    if (!made.ok()) {
      candidate.reason = made.status().message();
      if (made.status().code() == Code::kOutOfMemory) candidate.verdict = Verdict::kOverBudget;
      return candidate;
    }
    candidate.workspace_bytes.push_back(made->workspace_bytes);
    candidate.sent_bytes += made->schedule.sent_bytes();
    ranks.push_back(std::move(*made));
  }
  std::vector<const Schedule*> schedules;
  for (const RankPlan& rank : ranks) schedules.push_back(&rank.schedule);
  candidate.simulation = simulate(schedules, link, [&](int32_t rank, const Attend& attend) {
    return ranks[static_cast<size_t>(rank)].plans[static_cast<size_t>(attend.plan)]->estimated_us;
  });
  candidate.estimated_us = candidate.simulation.us;
  candidate.verdict = Verdict::kSlower;
  return candidate;
}

// One device that has all tokens: what a group is compared with.
double alone_us(const ShardedProblem& s, const Limits& limits, Plans& plans) {
  Problem alone = s.whole;  // with the pages that all keys fill
  const Strides mask = alone.stride_mask;
  set_dense(alone);
  alone.scale = s.whole.scale;
  alone.stride_mask = mask;
  Limits any = limits;
  any.workspace_bytes = kNoByteLimit;
  const auto plan = plans.of(canonical(alone), any);
  return plan.ok() && (*plan)->runnable() ? (*plan)->estimated_us : 0;
}

}  // namespace

Result<RankPlan> make_rank_plan(const ShardedProblem& s, Strategy strategy, int32_t rank,
                                const Limits& limits, const PlanOne& plan_one) {
  Plans plans(plan_one);
  return rank_plan(s, strategy, rank, limits, plans);
}

Result<ParallelPlan> make_parallel_plan(const ShardedProblem& s, const ParallelLimits& limits,
                                        const Link& link, const PlanOne& plan_one) {
  WH_RETURN_IF_ERROR(validate(s));
  if (!(link.gbytes_per_s > 0) || !(link.latency_us >= 0) || !(link.memory_gbytes_per_s > 0)) {
    return invalid(
        fmt::format("link has {} GB/s, {} us and memory of {} GB/s; rates must be "
                    "positive, the latency not negative",
                    link.gbytes_per_s, link.latency_us, link.memory_gbytes_per_s));
  }
  if (!limits.strategy.empty() && !kStrategies.value(limits.strategy)) {
    return invalid(
        fmt::format("strategy is \"{}\"; valid: {}", limits.strategy, kStrategies.list()));
  }
  ParallelPlan plan{s, link, {}, -1, 0};
  Plans plans(plan_one);
  for (size_t i = 0; i < std::size(kStrategies.names); ++i) {
    plan.candidates.push_back(assess(s, static_cast<Strategy>(i), limits, link, plans));
    const StrategyCandidate& candidate = plan.candidates.back();
    if (candidate.verdict != Verdict::kSlower) continue;
    if (!plan.runnable() || candidate.estimated_us < plan.best().estimated_us) {
      plan.chosen = static_cast<int32_t>(i);
    }
  }
  if (plan.runnable()) {
    plan.candidates[static_cast<size_t>(plan.chosen)].verdict = Verdict::kChosen;
  }
  plan.alone_us = alone_us(s, limits.each, plans);
  return plan;
}

Status runnable_status(const ParallelPlan& plan) {
  if (plan.runnable()) return {};
  std::string message = "the limits allow no strategy:";
  for (const StrategyCandidate& candidate : plan.candidates) {
    message += fmt::format("\n  {}: {}", kStrategies.name(candidate.strategy), candidate.reason);
  }
  return {Code::kRefused, message};
}

std::string explain(const ParallelPlan& plan) {
  const Problem& p = plan.problem.whole;
  const int32_t ranks = plan.problem.ranks();
  std::string text = fmt::format(
      "problem    {}, over {} ranks\nlink       {:g} GB/s each way, {:g} us a message\n",
      describe(p), ranks, plan.link.gbytes_per_s, plan.link.latency_us);
  if (plan.runnable()) {
    const StrategyCandidate& best = plan.best();
    text += fmt::format("strategy   {}, about {}\n", kStrategies.name(best.strategy),
                        format_us(best.estimated_us));
    if (plan.alone_us > 0) {
      const double speedup = plan.alone_us / best.estimated_us;
      text +=
          fmt::format("one device {} if it has everything: {}\n", format_us(plan.alone_us),
                      speedup > 1 ? fmt::format("{:.2f} x as long, {:.0f} % efficiency of {} ranks",
                                                speedup, 100 * speedup / ranks, ranks)
                                  : std::string("that is faster"));
    }
    text += "workspace ";
    for (const uint64_t bytes : best.workspace_bytes) text += " " + format_bytes(bytes);
    text += "\n";
  } else {
    text += "strategy   none is allowed by the limits\n";
  }
  text += fmt::format("\n{:<8}  {:<11}  {:>10}  {:>9}  {:>10}  {}\n", "strategy", "verdict",
                      "workspace", "estimate", "sent", "reason");
  for (const StrategyCandidate& candidate : plan.candidates) {
    const bool can = !candidate.workspace_bytes.empty() && candidate.estimated_us > 0;
    std::string line = fmt::format(
        "{:<8}  {:<11}  {:>10}  {:>9}  {:>10}  {}", kStrategies.name(candidate.strategy),
        kVerdicts.name(candidate.verdict),
        can ? format_bytes(*std::max_element(candidate.workspace_bytes.begin(),
                                             candidate.workspace_bytes.end()))
            : "-",
        can ? format_us(candidate.estimated_us) : "-",
        can ? format_bytes(static_cast<uint64_t>(candidate.sent_bytes)) : "-", candidate.reason);
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

}  // namespace wh::sharded
