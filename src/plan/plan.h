// A plan: which kernel runs, why every other one does not, what it takes and about how long. Plain
// data, made in microseconds, printable, serialisable, reusable for any tensors of its problem.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "plan/kernel.h"
#include "plan/profile.h"

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
  Problem problem;
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

// The machine a plan is made for: its facts and the kernels it can run, in order.
struct Machine {
  const CpuFacts& cpu;
  const CudaFacts& cuda;
  std::span<const Kernel* const> kernels;
  const Profile* profile = nullptr;  // measured costs; null: the kernels' formulas alone
  std::string_view estimates = "formula";
};

// Answers with a plan that is not runnable when the limits allow no kernel, and with an error when
// problem or limits make no sense.
Result<Plan> make_plan(const Problem& problem, const Limits& limits, const Machine& machine);

// Why a plan that is not runnable is not: one line for each candidate. Ok for a runnable one.
Status runnable_status(const Plan& plan);

// The table for people: the problem, the choice, every candidate with its verdict and reason.
std::string explain(const Plan& plan);

std::string to_json(const Plan& plan);

// The machine for problems of a device.
using MachineOf = Machine (*)(Device device, int32_t device_index);

// The inverse of to_json(). Checks that the plan is the one that would be made now: the same kernel
// with the same configuration and workspace.
Result<Plan> plan_from_json(const std::string& text, MachineOf machine_of);

const Kernel* find_kernel(std::span<const Kernel* const> kernels, const std::string& name);

// "1.5 MiB": for plans and messages.
std::string format_bytes(uint64_t bytes);
// "12.3 us", "4.56 ms", "1.2 s".
std::string format_us(double us);

}  // namespace wh
