// widehead plan: every candidate with its verdict, reason, workspace and estimate.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <fstream>
#include <memory>

#include "core/byte_size.h"
#include "input/limits_flags.h"
#include "input/parallel_flags.h"
#include "input/planning.h"
#include "input/problem_flags.h"
#include "measure/useful_work.h"
#include "parallel/stored_link.h"
#include "plan/explain.h"
#include "plan/names.h"
#include "plan/plan_json.h"
#include "plan/units.h"
#include "report/model_total.h"
#include "report/session.h"
#include "report/timeline.h"

namespace wh::cli {
namespace {

struct PlanFlags {
  ProblemFlags problem;
  LimitsFlags limits;
  std::string memory;
  ParallelFlags parallel;
  std::string timeline;
  bool json = false;

  bool is_backward() const { return problem.backward == "true"; }
};

// --memory, and the longest context that it holds.
Result<MemoryLimit> read_memory(const PlanFlags& flags, const Limits& limits) {
  if (flags.memory.empty()) return MemoryLimit{};
  if (flags.problem.model.empty() || flags.is_backward()) {
    return invalid(fmt::format("--memory has no effect {}; it is for a model's cache and workspace",
                               flags.is_backward() ? "with --backward" : "without --model"));
  }
  const auto bytes = parse_bytes(flags.memory);
  if (!bytes) {
    return invalid(
        fmt::format("--memory is \"{}\"; it must be bytes, or a size as in 24GiB", flags.memory));
  }
  const auto keys = largest_context(flags.problem, limits, *bytes);
  if (!keys.ok()) return keys.status();
  if (*keys == 0) {
    return invalid(fmt::format("--memory is {}; not even one key of {} fits beside the workspace",
                               flags.memory, flags.problem.model));
  }
  return MemoryLimit{bytes, *keys};
}

Json json_of(const sharded::ParallelPlan& plan) {
  Json rows = Json::array();
  for (const sharded::StrategyCandidate& candidate : plan.candidates) {
    rows.push_back({{"strategy", sharded::kStrategies.name(candidate.strategy)},
                    {"verdict", kVerdicts.name(candidate.verdict)},
                    {"reason", candidate.reason},
                    {"workspace_bytes", candidate.workspace_bytes},
                    {"sent_bytes", candidate.sent_bytes},
                    {"estimated_us", candidate.estimated_us}});
  }
  return {{"problem", describe(plan.problem.whole)},
          {"ranks", plan.problem.ranks()},
          {"link_gbytes_per_s", plan.link.gbytes_per_s},
          {"link_latency_us", plan.link.latency_us},
          {"strategy", plan.runnable() ? sharded::kStrategies.name(plan.best().strategy) : ""},
          {"estimated_us", plan.runnable() ? plan.best().estimated_us : 0},
          {"one_device_us", plan.alone_us},
          {"candidates", rows}};
}

// --link, or what `tune --parallel` measured.
Result<sharded::Link> link_of(const PlanFlags& flags, Device device, double memory_gbytes_per_s) {
  if (!flags.parallel.link.empty()) return read_link(flags.parallel.link, memory_gbytes_per_s);
  const auto stored =
      flags.parallel.card.empty() ? stored_link(device, memory_gbytes_per_s) : std::nullopt;
  if (!stored) {
    return invalid(
        "--link is missing: what connects the ranks, as in 400GB/s; `widehead tune --parallel` "
        "measures it");
  }
  if (!flags.json) fmt::print("link       {}\n", stored->description);
  return stored->link;
}

int run_parallel_plan(const PlanFlags& flags, const Request& request, const Limits& limits,
                      Json& documents) {
  if (!flags.memory.empty()) return report(invalid("--memory has no effect with --ranks"));
  const auto planner = planner_for(flags.parallel, request.problem);
  if (!planner.ok()) return report(planner.status());
  const auto link = link_of(flags, request.problem.device, planner->memory_gbytes_per_s);
  if (!link.ok()) return report(link.status());
  const auto sharded = read_sharded(flags.parallel, request, flags.parallel.ranks);
  if (!sharded.ok()) return report(sharded.status());
  const auto plan =
      make_parallel_plan(*sharded, {limits, flags.parallel.strategy}, *link, planner->plan_one);
  if (!plan.ok()) return report(plan.status());
  documents.push_back(json_of(*plan));
  if (!flags.json) fmt::print("{}", explain(*plan));
  if (!plan->runnable()) return kNoKernel;
  if (flags.timeline.empty()) return kFine;
  std::ofstream file(flags.timeline);
  file << timeline_svg(fmt::format("{}, {} ranks, {}", request.name(), plan->problem.ranks(),
                                   sharded::kStrategies.name(plan->best().strategy)),
                       plan->best().simulation, plan->problem.ranks());
  if (file.flush()) return kFine;
  return report({Code::kInternal, fmt::format("cannot write {}", flags.timeline)});
}

int run_parallel_plans(const PlanFlags& flags, const Limits& limits) {
  const auto requests = read_requests(flags.problem);
  if (!requests.ok()) return report(requests.status());
  Json documents = Json::array();
  int worst = kFine;
  for (const Request& request : *requests) {
    worst = std::max(worst, run_parallel_plan(flags, request, limits, documents));
  }
  if (flags.json && !documents.empty()) {
    fmt::print("{}\n", (flags.problem.model.empty() ? documents.front() : documents).dump(2));
  }
  return worst;
}

int run_plan(const PlanFlags& flags) {
  const auto limits = read_limits(flags.limits);
  if (!limits.ok()) return report(limits.status());
  if (flags.parallel.ranks > 0) return run_parallel_plans(flags, *limits);
  if (Status status = refuse_parallel_flags(flags.parallel, "--ranks"); !status.ok()) {
    return report(status);
  }
  if (!flags.timeline.empty()) return report(invalid("--timeline has no effect without --ranks"));
  const auto memory = read_memory(flags, *limits);
  if (!memory.ok()) return report(memory.status());
  ProblemFlags problem = flags.problem;
  if (memory->largest_context && problem.context.empty()) {
    problem.context = std::to_string(*memory->largest_context);
  }
  const auto requests = read_requests(problem);
  if (!requests.ok()) return report(requests.status());
  int code = kFine;
  Json documents = Json::array();
  std::string text;
  std::vector<Plan> plans;
  for (const Request& request : *requests) {
    const Problem& p = request.problem;
    Result<Plan> plan = plan_as_library(p, *limits);
    if (!plan.ok()) return report(plan.status());
    if (!plan->runnable()) code = kNoKernel;
    Json document = Json::parse(to_json(*plan));
    document["environment"] = environment_json(p);
    if (!request.label.empty()) {
      document["layers"] = request.label;
      document["kv_bytes_per_layer"] = kv_bytes(request);
      text += fmt::format("{}layers     {}\nKV cache   {} a layer\n", text.empty() ? "" : "\n",
                          request.label, format_bytes(static_cast<uint64_t>(kv_bytes(request))));
    }
    documents.push_back(std::move(document));
    text += environment_line(p) + explain(*plan);
    plans.push_back(std::move(*plan));
  }
  if (!flags.problem.model.empty() && !flags.is_backward()) {
    const ModelTotal total = model_total(flags.problem.model, *requests, plans);
    text += "\n" + explain(total, *memory);
    for (Json& document : documents) document["model"] = to_json(total, *memory);
  }
  if (flags.json) {
    const Json& shown = flags.problem.model.empty() ? documents.front() : documents;
    fmt::print("{}\n", shown.dump(2));
  } else {
    fmt::print("{}", text);
  }
  if (code == kNoKernel) {
    fmt::print(stderr, "widehead: the limits allow no kernel; the reasons are in the table\n");
  }
  return code;
}

}  // namespace

void add_plan(CLI::App& app, Action& action) {
  auto flags = std::make_shared<PlanFlags>();
  CLI::App* verb = app.add_subcommand("plan", "Say which kernel would run, and why no other");
  add_problem_flags(*verb, flags->problem);
  add_limits_flags(*verb, flags->limits);
  verb->add_option("--memory", flags->memory, "for the cache and the workspace of a --model: 24GiB")
      ->check(refuse_empty);
  add_ranks_flag(*verb, flags->parallel, "plan for so many ranks, each with a part");
  add_parallel_flags(*verb, flags->parallel);
  verb->add_option("--card", flags->parallel.card,
                   "plan ranks of a card that need not be there: h100 or h200")
      ->group("PARALLEL");
  verb->add_option("--timeline", flags->timeline, "write what ranks do when to this .svg file")
      ->group("PARALLEL");
  verb->add_flag("--json", flags->json, "print one JSON document");
  verb->callback([flags, &action] { action = [flags] { return run_plan(*flags); }; });
}

}  // namespace wh::cli
