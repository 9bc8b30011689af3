// The plan as JSON and back. docs/planner.md lists the fields.
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "core/json_reader.h"
#include "plan/names.h"
#include "plan/plan.h"

namespace wh {
namespace {

using Json = nlohmann::ordered_json;

Json problem_json(const Problem& p) {
  return {{"device", kDevices.name(p.device)},
          {"device_index", p.device_index},
          {"dtype", kDtypes.name(p.dtype_q)},
          {"kv_dtype", kDtypes.name(p.dtype_kv)},
          {"batch", p.batch},
          {"heads_q", p.heads_q},
          {"heads_kv", p.heads_kv},
          {"len_q", p.len_q},
          {"len_k", p.len_k},
          {"dim_qk", p.dim_qk},
          {"dim_v", p.dim_v},
          {"stride_q", p.stride_q},
          {"stride_k", p.stride_k},
          {"stride_v", p.stride_v},
          {"stride_out", p.stride_out},
          {"stride_mask", p.stride_mask},
          {"scale", p.scale},
          {"softcap", p.softcap},
          {"causal", kCausals.name(p.causal)},
          {"window_left", p.window_left},
          {"window_right", p.window_right},
          {"mask", kMasks.name(p.mask)},
          {"sinks", p.has_sinks},
          {"key_lengths", p.has_key_lengths},
          {"key_starts", p.has_key_starts},
          {"log_sum_exp", p.wants_log_sum_exp},
          {"values_in_keys", p.values_in_keys}};
}

Problem read_problem(const Json& json) {
  const JsonReader reader(json, "problem");
  Problem p;
  reader.read("device", kDevices, p.device);
  reader.read("device_index", p.device_index);
  reader.read("dtype", kDtypes, p.dtype_q);
  reader.read("kv_dtype", kDtypes, p.dtype_kv);
  reader.read("batch", p.batch);
  reader.read("heads_q", p.heads_q);
  reader.read("heads_kv", p.heads_kv);
  reader.read("len_q", p.len_q);
  reader.read("len_k", p.len_k);
  reader.read("dim_qk", p.dim_qk);
  reader.read("dim_v", p.dim_v);
  reader.read("stride_q", p.stride_q);
  reader.read("stride_k", p.stride_k);
  reader.read("stride_v", p.stride_v);
  reader.read("stride_out", p.stride_out);
  reader.read("stride_mask", p.stride_mask);
  reader.read("scale", p.scale);
  reader.read("softcap", p.softcap);
  reader.read("causal", kCausals, p.causal);
  reader.read("window_left", p.window_left);
  reader.read("window_right", p.window_right);
  reader.read("mask", kMasks, p.mask);
  reader.read("sinks", p.has_sinks);
  reader.read("key_lengths", p.has_key_lengths);
  reader.read("key_starts", p.has_key_starts);
  reader.read("log_sum_exp", p.wants_log_sum_exp);
  reader.read("values_in_keys", p.values_in_keys);
  return p;
}

Json limits_json(const Limits& limits) {
  Json json{{"policy", kPolicies.name(limits.policy)},
            {"fused_above", limits.fused_above},
            {"kernel", limits.kernel},
            {"threads", limits.threads},
            {"precision", kPrecisions.name(limits.precision)},
            {"longest_step_us", limits.longest_step_us},
            {"batch_invariant", limits.batch_invariant},
            {"fresh_keys", limits.fresh_keys}};
  // JSON has no infinity, and 2^64 - 1 would read as a wish for 16 EiB.
  json["workspace_bytes"] =
      limits.workspace_bytes == kNoByteLimit ? Json(nullptr) : Json(limits.workspace_bytes);
  return json;
}

Limits read_limits(const Json& json) {
  const JsonReader reader(json, "limits");
  Limits limits;
  if (!reader.member("workspace_bytes").is_null()) {
    reader.read("workspace_bytes", limits.workspace_bytes);
  }
  reader.read("policy", kPolicies, limits.policy);
  reader.read("fused_above", limits.fused_above);
  reader.read("kernel", limits.kernel);
  reader.read("threads", limits.threads);
  reader.read("precision", kPrecisions, limits.precision);
  reader.read("longest_step_us", limits.longest_step_us);
  reader.read("batch_invariant", limits.batch_invariant);
  reader.read("fresh_keys", limits.fresh_keys);
  return limits;
}

Json config_json(const Config& config) {
  return {{"variant", config.variant},       {"threads", config.threads},
          {"tile_q", config.tile_q},         {"tile_k", config.tile_k},
          {"chunk_keys", config.chunk_keys}, {"fresh_keys", config.fresh_keys},
          {"step_tiles", config.step_tiles}};
}

Config read_config(const Json& json) {
  const JsonReader reader(json, "config");
  Config config;
  reader.read("variant", config.variant);
  reader.read("threads", config.threads);
  reader.read("tile_q", config.tile_q);
  reader.read("tile_k", config.tile_k);
  reader.read("chunk_keys", config.chunk_keys);
  reader.read("fresh_keys", config.fresh_keys);
  reader.read("step_tiles", config.step_tiles);
  return config;
}

Candidate read_candidate(const Json& json, size_t index) {
  const JsonReader reader(json, fmt::format("candidates[{}]", index));
  Candidate candidate;
  reader.read("kernel", candidate.kernel);
  reader.read("verdict", kVerdicts, candidate.verdict);
  reader.read("reason", candidate.reason);
  reader.read("workspace_bytes", candidate.workspace_bytes);
  reader.read("estimated_us", candidate.estimated_us);
  return candidate;
}

Plan read_plan(const Json& json) {
  const JsonReader reader(json, "plan");
  Plan plan;
  plan.problem = read_problem(reader.member("problem"));
  plan.limits = read_limits(reader.member("limits"));
  plan.config = read_config(reader.member("config"));
  reader.read("device", plan.device);
  reader.read("kernel", plan.kernel);
  reader.read("workspace_bytes", plan.workspace_bytes);
  reader.read("estimated_us", plan.estimated_us);
  reader.read("estimates", plan.estimates);
  const Json& candidates = reader.member("candidates");
  if (!candidates.is_array()) throw MalformedJson{"plan.candidates is not an array"};
  for (size_t i = 0; i < candidates.size(); ++i) {
    plan.candidates.push_back(read_candidate(candidates[i], i));
  }
  return plan;
}

// A plan carries tile sizes and bytes that a kernel trusts, so a stored one is made again and
// compared: an edited file, or one of another machine or version, must not reach a kernel.
Status check_against_machine(const Plan& plan, const Machine& machine) {
  const Result<Plan> again = make_plan(plan.problem, plan.limits, machine);
  if (!again.ok()) return again.status();
  if (again->kernel != plan.kernel || again->config != plan.config ||
      again->workspace_bytes != plan.workspace_bytes) {
    return invalid(fmt::format(
        "the stored plan is {} with {} of workspace for \"{}\", but this machine and version plan "
        "{} with {}; plan again",
        plan.kernel.empty() ? "no kernel" : plan.kernel, format_bytes(plan.workspace_bytes),
        plan.device, again->kernel.empty() ? "no kernel" : again->kernel,
        format_bytes(again->workspace_bytes)));
  }
  return {};
}

}  // namespace

std::string to_json(const Plan& plan) {
  Json candidates = Json::array();
  for (const Candidate& candidate : plan.candidates) {
    candidates.push_back({{"kernel", candidate.kernel},
                          {"verdict", kVerdicts.name(candidate.verdict)},
                          {"reason", candidate.reason},
                          {"workspace_bytes", candidate.workspace_bytes},
                          {"estimated_us", candidate.estimated_us}});
  }
  const Json json{{"problem", problem_json(plan.problem)},
                  {"limits", limits_json(plan.limits)},
                  {"device", plan.device},
                  {"kernel", plan.kernel},
                  {"config", config_json(plan.config)},
                  {"workspace_bytes", plan.workspace_bytes},
                  {"estimated_us", plan.estimated_us},
                  {"estimates", plan.estimates},
                  {"candidates", candidates}};
  return json.dump(2, ' ', false, Json::error_handler_t::replace);
}

Result<Plan> plan_from_json(const std::string& text, MachineOf machine_of) {
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) return invalid("the plan is not JSON");
  try {
    Plan plan = read_plan(json);
    // Before the machine is asked for: a device index of the text's must be a sane one.
    if (Status status = validate(plan.problem); !status.ok()) return status;
    const Machine machine = machine_of(plan.problem.device, plan.problem.device_index);
    if (Status status = check_against_machine(plan, machine); !status.ok()) return status;
    return plan;
  } catch (const MalformedJson& error) {
    return invalid("the plan is malformed: " + error.message);
  }
}

}  // namespace wh
