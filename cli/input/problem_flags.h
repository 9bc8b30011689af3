// PROBLEM of the command line: one set of words for flags, suites and model tables.
#pragma once

#include <string>
#include <vector>

#include "core/problem.h"
#include "core/status.h"
#include "input/embedded.h"
#include "verify/input.h"

namespace CLI {
class App;
}

namespace wh::cli {

// As written; empty: not given.
struct ProblemFlags {
  std::string batch, heads, dim, queries, keys, dtype, kv_dtype, causal, window, softcap, scale,
      mask, sinks, key_lengths, key_starts, lengths, query_lengths, pages, log_sum_exp,
      values_in_keys, f32_out, layout, device, model, context, backward;
};

// When a layer computes in this form: latent attention has one for prefill and one for decode.
enum class Phase : uint8_t { kAny, kPrefill, kDecode };

// A problem with the values that its shape alone does not hold.
struct Request {
  std::string label;          // of a model's layer; empty: the problem speaks for itself
  int64_t layers = 0;         // of a model: that compute this
  int64_t cached_layers = 0;  // of them: that keep a cache of their own
  Phase phase = Phase::kAny;
  std::string details;  // what describe() leaves out: ", log-sum-exp", the layout
  Problem problem;
  std::vector<int32_t> key_lengths, key_starts;     // one a batch entry, or one for all
  std::vector<int32_t> query_offsets, key_offsets;  // of packed ones: where each sequence's begin

  // N(0, 1) data, a mask that hides a quarter of the keys and pages in random order: what timing
  // wants.
  Input input(uint64_t seed) const;
  std::string name() const { return label.empty() ? describe(problem) + details : label; }
};

// Makes it the backward pass of the same problem: gradients lie as their tensors do, and the
// gradient of out as out does.
void turn_backward(Problem& problem);

// One value for each batch entry.
std::vector<int32_t> per_batch(const std::vector<int32_t>& values, int64_t batch);

void add_problem_flags(CLI::App& app, ProblemFlags& flags);

// One problem, or with --model one for each kind of the model's layers.
Result<std::vector<Request>> read_requests(const ProblemFlags& flags);

// Puts the options among the flags (causal, window, softcap, scale, log-sum-exp, device) in place
// of those of a problem that a file's tensors gave its shape. A flag of the shape is an error.
Status override_options(const ProblemFlags& flags, Problem& problem);

// The rows of a suite, with its lists multiplied out. `overrides` win over a row's own values.
Result<std::vector<Request>> read_suite(const std::string& suite, const ProblemFlags& overrides);

}  // namespace wh::cli
