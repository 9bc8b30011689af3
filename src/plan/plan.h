// A plan: which kernel runs, why every other one does not, what it takes and about how long. Plain
// data, made in microseconds, printable, serialisable, reusable for any tensors of its problem.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan/kernel.h"

namespace wh {

enum class Verdict : uint8_t { kChosen, kSlower, kRefused, kOverBudget };

struct Candidate {
  std::string kernel;
  Verdict verdict = Verdict::kRefused;
  std::string reason;            // of a refusal, an excess, a policy; mostly empty when slower
  uint64_t workspace_bytes = 0;  // 0 when the kernel cannot take the problem
  double estimated_us = 0;       // 0 when the kernel cannot take the problem
  bool operator==(const Candidate&) const = default;
};

struct Plan {
  Problem problem;  // canonical()
  Limits limits;
  std::string device;  // what it was planned for, for people to read
  std::string kernel;  // empty: no kernel is allowed, and the candidates say why
  Config config;
  std::string variant;  // the instruction set or arithmetic that runs, for people to read
  uint64_t workspace_bytes = 0;
  double estimated_us = 0;
  std::string estimates;              // where the times come from: formula, or which profile
  std::vector<Candidate> candidates;  // in the registry's order

  bool runnable() const { return !kernel.empty(); }
  bool operator==(const Plan&) const = default;
};

// Why a plan that is not runnable is not: one line for each candidate. Ok for a runnable one.
Status runnable_status(const Plan& plan);

}  // namespace wh
