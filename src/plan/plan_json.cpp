#include "plan/plan_json.h"

#include <fmt/format.h>

#include "core/json_reader.h"
#include "core/json_writer.h"
#include "core/problem_fields.h"
#include "plan/backend.h"
#include "plan/names.h"
#include "plan/units.h"

namespace wh {
namespace {

using Json = nlohmann::json;

template <typename Enum, size_t kCount>
void write_field(const Choice<Enum, kCount>& field, Enum value, JsonWriter& json) {
  json.write(field.json, field.values.name(value));
}
void write_field(const StridesOf& field, const Strides& value, JsonWriter& json) {
  json.write_array(field.name, value);
}
template <typename Field, typename Value>
void write_field(const Field& field, Value value, JsonWriter& json) {
  json.write(field.name, value);
}

void write_problem(const Problem& p, JsonWriter& json) {
  json.begin_object("problem");
  visit_fields([&](const auto& field, const auto& value) { write_field(field, value, json); }, p);
  for (const Use& use : kUses) json.write(use.name, p.*use.field);
  json.end_object();
}

template <typename Enum, size_t kCount>
void read_field(const Choice<Enum, kCount>& field, Enum& value, const JsonReader& reader) {
  reader.read(field.json, field.values, value);
}
template <typename Field, typename Value>
void read_field(const Field& field, Value& value, const JsonReader& reader) {
  reader.read(field.name, value);
}

Problem read_problem(const Json& json) {
  const JsonReader reader(json, "problem");
  Problem p;
  visit_fields([&](const auto& field, auto& value) { read_field(field, value, reader); }, p);
  for (const Use& use : kUses) reader.read(use.name, p.*use.field);
  return p;
}

void write_limits(const Limits& limits, JsonWriter& json) {
  json.begin_object("limits");
  json.write("policy", kPolicies.name(limits.policy));
  json.write("fused_above", limits.fused_above);
  json.write("kernel", limits.kernel);
  json.write("threads", limits.threads);
  json.write("precision", kPrecisions.name(limits.precision));
  json.write("longest_step_us", limits.longest_step_us);
  json.write("batch_invariant", limits.batch_invariant);
  json.write("fresh_keys", limits.fresh_keys);
  // JSON has no infinity, and 2^64 - 1 would read as a wish for 16 EiB.
  if (limits.workspace_bytes == kNoByteLimit) {
    json.write("workspace_bytes", nullptr);
  } else {
    json.write("workspace_bytes", limits.workspace_bytes);
  }
  json.end_object();
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

// What a CPU plan's workers are. JSON has it beside `workers`, which are blocks on CUDA.
int32_t threads_of(const Plan& plan) {
  return backend(plan.problem.device).is_host() ? plan.config.workers : 0;
}

void write_config(const Plan& plan, JsonWriter& json) {
  const Config& config = plan.config;
  json.begin_object("config");
  json.write("variant", plan.variant);
  json.write("arithmetic", kArithmetics.name(config.arithmetic));
  json.write("threads", threads_of(plan));
  json.write("workers", config.workers);
  json.write("splits", config.splits);
  json.write("instance", config.instance);
  json.write("tile_q", config.tile_q);
  json.write("tile_k", config.tile_k);
  json.write("chunk_keys", config.chunk_keys);
  json.write("fresh_keys", config.fresh_keys);
  json.write("step_tiles", config.step_tiles);
  json.end_object();
}

void read_config(const Json& json, Plan& plan) {
  const JsonReader reader(json, "config");
  Config& config = plan.config;
  reader.read("variant", plan.variant);
  reader.read("arithmetic", kArithmetics, config.arithmetic);
  int32_t threads = 0;
  reader.read("threads", threads);
  reader.read("workers", config.workers);
  reader.read("splits", config.splits);
  reader.read("instance", config.instance);
  reader.read("tile_q", config.tile_q);
  reader.read("tile_k", config.tile_k);
  reader.read("chunk_keys", config.chunk_keys);
  reader.read("fresh_keys", config.fresh_keys);
  reader.read("step_tiles", config.step_tiles);
  if (threads == threads_of(plan)) return;
  throw MalformedJson{fmt::format("config.threads is {}; {} workers make it {}", threads,
                                  config.workers, threads_of(plan))};
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
  read_config(reader.member("config"), plan);
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
      again->variant != plan.variant || again->workspace_bytes != plan.workspace_bytes) {
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
  JsonWriter json(JsonWriter::Layout::kIndented);
  json.begin_object();
  write_problem(plan.problem, json);
  write_limits(plan.limits, json);
  json.write("device", plan.device);
  json.write("kernel", plan.kernel);
  write_config(plan, json);
  json.write("workspace_bytes", plan.workspace_bytes);
  json.write("estimated_us", plan.estimated_us);
  json.write("estimates", plan.estimates);
  json.begin_array("candidates");
  for (const Candidate& candidate : plan.candidates) {
    json.begin_object();
    json.write("kernel", candidate.kernel);
    json.write("verdict", kVerdicts.name(candidate.verdict));
    json.write("reason", candidate.reason);
    json.write("workspace_bytes", candidate.workspace_bytes);
    json.write("estimated_us", candidate.estimated_us);
    json.end_object();
  }
  json.end_array();
  json.end_object();
  return json.take();
}

Result<Plan> plan_from_json(const std::string& text, MachineOf machine_of) {
  const JsonDocument document(text);
  if (!document.is_valid()) return invalid("the plan is not JSON");
  try {
    Plan plan = read_plan(document.root());
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
