// widehead plan: every candidate with its verdict, reason, workspace and estimate.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>

#include "core/byte_size.h"
#include "input/limits_flags.h"
#include "input/planning.h"
#include "input/problem_flags.h"
#include "measure/useful_work.h"
#include "plan/explain.h"
#include "plan/plan_json.h"
#include "plan/units.h"
#include "report/model_total.h"
#include "report/session.h"

namespace wh::cli {
namespace {

struct PlanFlags {
  ProblemFlags problem;
  LimitsFlags limits;
  std::string memory;
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

int run_plan(const PlanFlags& flags) {
  const auto limits = read_limits(flags.limits);
  if (!limits.ok()) return report(limits.status());
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
  verb->add_flag("--json", flags->json, "print one JSON document");
  verb->callback([flags, &action] { action = [flags] { return run_plan(*flags); }; });
}

}  // namespace wh::cli
