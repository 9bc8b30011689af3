// Attention over the ranks of a process group: widehead.torch.parallel.
#pragma once

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "call.h"

namespace widehead_python {

// Who has what, and who sends it. `group` has start(exchange, transfers) and finish(exchange,
// timeout_s), which raise; allocate(bytes) answers with the address of a workspace.
struct Ranks {
  std::vector<std::tuple<int64_t, int64_t, int32_t>> tokens_q, tokens_k;  // begin, end, rank
  std::optional<std::vector<int32_t>> key_lengths, key_starts;
  std::string strategy;            // empty: the planner chooses
  std::pair<double, double> link;  // GB/s and microseconds; 0: measured
  double timeout_s;
  int32_t rank, ranks;
};

// Answers with out, or out and the log-sum-exp, and what the plan says. The mask is the whole's,
// the arguments have none.
nb::tuple parallel_attention(Arguments arguments, nb::handle mask, const Ranks& ranks,
                             const wh_limits& limits, nb::handle group, nb::handle allocate,
                             nb::handle empty);

}  // namespace widehead_python
