// A problem with its tensors, and perhaps its answer, from a file.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "input/problem_flags.h"
#include "input/safetensors.h"
#include "verify/host_tensors.h"

namespace wh::cli {

// Shapes and types come from the file's tensors, options from its metadata or, over them, from
// flags.
struct StoredProblem {
  MappedFile file;  // where inputs lie that need no copy
  Request request;
  std::vector<GuardedTensor> buffers;  // those that do, and the outputs
  Tensors tensors;
  // The answer stored beside the inputs, if any: f32, [batch, heads_q, len_q, dim_v].
  std::optional<StoredTensor> out, log_sum_exp;
};
Result<StoredProblem> read_problem_file(const std::string& path, const ProblemFlags& options);
// The same without a file of its own: `view` must outlive the answer.
Result<StoredProblem> read_problem(const SafetensorsView& view, const ProblemFlags& options);

}  // namespace wh::cli
