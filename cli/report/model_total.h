// What all attention layers of a model take together: the question of who serves it.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "input/problem_flags.h"
#include "plan/plan.h"

namespace wh::cli {

struct ModelTotal {
  struct Kind {
    std::string label;
    int64_t layers = 0, cached_layers = 0;
    double cache_bytes = 0;   // of all of them
    double estimated_us = 0;  // of all of them; 0 for a form that this many queries do not use
  };
  std::string model;
  int64_t layers = 0, linear_layers = 0;
  int64_t batch = 0, queries = 0, keys = 0;
  double cache_bytes = 0;
  double expanded_bytes = 0;     // keys and values of one latent layer, where prefill expands them
  uint64_t workspace_bytes = 0;  // layers run one after the other: the largest
  double estimated_us = 0;
  bool is_runnable = true;  // false: the limits allow no kernel for some layers
  std::vector<Kind> kinds;

  double memory_bytes() const {
    return cache_bytes + expanded_bytes + static_cast<double>(workspace_bytes);
  }
};

// `requests` are those of a model, and plans[i] is the plan of requests[i].
ModelTotal model_total(const std::string& model, const std::vector<Request>& requests,
                       const std::vector<Plan>& plans);

// The most keys whose cache fits memory_bytes beside what a run takes, for the model of the flags;
// 0: none.
Result<int64_t> largest_context(ProblemFlags flags, const Limits& limits, uint64_t memory_bytes);

// A total beside what was to hold it; both empty without --memory.
struct MemoryLimit {
  std::optional<uint64_t> bytes;
  std::optional<int64_t> largest_context;
};
std::string explain(const ModelTotal& total, const MemoryLimit& memory);
Json to_json(const ModelTotal& total, const MemoryLimit& memory);

}  // namespace wh::cli
