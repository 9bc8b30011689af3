#include "report/model_total.h"

#include <fmt/format.h>

#include <algorithm>

#include "api/machine.h"
#include "input/planning.h"
#include "plan/planner.h"
#include "plan/units.h"
#include "plan/work.h"

namespace wh::cli {
namespace {

// A latent layer with more queries than these expands its cache: that costs
// 2 * rank * (dim_qk - rope + dim_v) a key and head once, and saves the difference of the dims,
// 2 * (576 + 512 - 192 - 128) for DeepSeek-V3, a key, head and query: even at 171 queries there, at
// 153 for Mistral Small 4 and 398 for GLM-4.7-Flash.
constexpr int64_t kMostAbsorbedQueries = 160;

bool is_used(const Request& request) {
  const Phase phase =
      request.problem.len_q <= kMostAbsorbedQueries ? Phase::kDecode : Phase::kPrefill;
  return request.phase == Phase::kAny || request.phase == phase;
}

// What one layer keeps: of a sliding one the keys that the queries see together.
double cache_bytes(const Request& request) {
  if (request.phase == Phase::kPrefill) return 0;  // it reads what the absorbed form does
  Problem kept = request.problem;
  kept.len_k = most_visible_keys(kept);
  return kv_bytes(kept);
}

std::string bytes_text(double bytes) { return format_bytes(static_cast<uint64_t>(bytes)); }

}  // namespace

ModelTotal model_total(const std::string& model, const std::vector<Request>& requests,
                       const std::vector<Plan>& plans) {
  ModelTotal total;
  const Problem& p = requests.front().problem;
  total.model = model;
  total.linear_layers = models()[model].value("linear_layers", int64_t{0});
  total.batch = p.batch;
  total.queries = p.len_q;
  total.keys = p.len_k;
  for (size_t i = 0; i < requests.size(); ++i) {
    const Request& request = requests[i];
    ModelTotal::Kind kind{request.label, request.layers, request.cached_layers,
                          cache_bytes(request) * static_cast<double>(request.cached_layers), 0};
    total.cache_bytes += kind.cache_bytes;
    if (is_used(request)) {
      kind.estimated_us = plans[i].estimated_us * static_cast<double>(request.layers);
      total.layers += request.layers;
      total.estimated_us += kind.estimated_us;
      total.workspace_bytes = std::max(total.workspace_bytes, plans[i].workspace_bytes);
      total.is_runnable = total.is_runnable && plans[i].runnable();
      if (request.phase == Phase::kPrefill) total.expanded_bytes = kv_bytes(request.problem);
    }
    total.kinds.push_back(std::move(kind));
  }
  return total;
}

Result<int64_t> largest_context(ProblemFlags flags, const Limits& limits, uint64_t memory_bytes) {
  const std::string model = flags.model;
  const auto memory_at = [&](int64_t keys) -> Result<double> {
    flags.context = std::to_string(keys);
    const auto requests = read_requests(flags);
    if (!requests.ok()) return requests.status();
    std::vector<Plan> plans;
    for (const Request& request : *requests) {
      const Problem& p = request.problem;
      const Result<Limits> allowed = limits_as_library(p, limits);
      if (!allowed.ok()) return allowed.status();
      // Not plan_as_library(): a log of plans is of those that a program would get.
      Result<Plan> plan = make_plan(p, *allowed, this_machine(p.device, p.device_index));
      if (!plan.ok()) return plan.status();
      plans.push_back(std::move(*plan));
    }
    return model_total(model, *requests, plans).memory_bytes();
  };
  // The cache grows with every key. A workspace may shrink where another kernel takes over, by less
  // than matters here: the answer fits, and a longer one that would is not far.
  int64_t fits = 0, too_many = kMaxLength;
  while (too_many - fits > 1) {
    const int64_t keys = fits + (too_many - fits) / 2;
    const Result<double> bytes = memory_at(keys);
    if (!bytes.ok()) return bytes.status();
    (*bytes <= static_cast<double>(memory_bytes) ? fits : too_many) = keys;
  }
  return fits;
}

std::string explain(const ModelTotal& total, const MemoryLimit& memory) {
  const std::string queries =
      total.queries == 1 ? "a token" : fmt::format("a chunk of {} queries", total.queries);
  const std::string sequences =
      total.batch == 1 ? "" : fmt::format(" of each of {} sequences", total.batch);
  const std::string all =
      total.linear_layers == 0 ? "" : fmt::format(" of {}", total.layers + total.linear_layers);
  std::string text = fmt::format("model      {}, attention in {}{} layers: {} over {} keys{}\n",
                                 total.model, total.layers, all, queries, total.keys, sequences);
  std::string kinds;
  for (const ModelTotal::Kind& kind : total.kinds) {
    if (kind.cache_bytes == 0) continue;
    kinds += fmt::format("{}{} {} {}", kinds.empty() ? "" : ", ", kind.cached_layers, kind.label,
                         bytes_text(kind.cache_bytes));
  }
  text += fmt::format("KV cache   {}: {}\n", bytes_text(total.cache_bytes), kinds);
  if (total.expanded_bytes > 0) {
    text += fmt::format("expanded   {}, keys and values of one layer at a time\n",
                        bytes_text(total.expanded_bytes));
  }
  if (!total.is_runnable)
    return text + "time       none: the limits allow no kernel for some layers\n";
  text += fmt::format("workspace  {}, of one layer at a time\ntime       {} {}{}\n",
                      format_bytes(total.workspace_bytes), format_us(total.estimated_us), queries,
                      sequences);
  text += "memory     " + bytes_text(total.memory_bytes());
  if (memory.bytes) {
    text += fmt::format(" of {}, which {} keys fit", format_bytes(*memory.bytes),
                        *memory.largest_context);
  }
  return text + "\n";
}

Json to_json(const ModelTotal& total, const MemoryLimit& memory) {
  Json kinds = Json::array();
  for (const ModelTotal::Kind& kind : total.kinds) {
    kinds.push_back({{"layers", kind.label},
                     {"count", kind.layers},
                     {"cached", kind.cached_layers},
                     {"cache_bytes", kind.cache_bytes},
                     {"estimated_us", kind.estimated_us}});
  }
  Json json{{"name", total.model},
            {"attention_layers", total.layers},
            {"linear_layers", total.linear_layers},
            {"batch", total.batch},
            {"queries", total.queries},
            {"keys", total.keys},
            {"cache_bytes", total.cache_bytes},
            {"expanded_bytes", total.expanded_bytes},
            {"workspace_bytes", total.workspace_bytes},
            {"memory_bytes", total.memory_bytes()},
            {"estimated_us", total.is_runnable ? Json(total.estimated_us) : Json()},
            {"kinds", std::move(kinds)}};
  if (memory.bytes) {
    json["memory_limit_bytes"] = *memory.bytes;
    json["largest_context"] = *memory.largest_context;
  }
  return json;
}

}  // namespace wh::cli
