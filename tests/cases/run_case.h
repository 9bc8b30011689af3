// Runs one case on one kernel and says what was wrong.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cases.h"
#include "plan/planner.h"

namespace wh {

struct CheckOptions {
  int64_t runs = 1;          // of each kernel on each case; all must give the same bits
  int64_t shared_bytes = 0;  // plans as if a block of the card had so many; 0: what it has
  // NaN bits in the workspace show a kernel that reads what it has not written, but hide it from a
  // tool that watches for that.
  bool paints_workspace = true;
};

enum class Outcome { kRight, kRefused, kWrong };

struct CaseResult {
  std::string kernel;
  Outcome outcome = Outcome::kRight;
  std::string message;            // why it was refused, or what was wrong
  double share_of_tolerance = 0;  // of the relative RMS error
};

// What a case's kernels read and write, and what they should answer.
class CaseData;

// A case with its answer, to be run by several kernels.
class CheckedCase {
 public:
  // Of the backward pass: the same case, whose out and log-sum-exp gradients are made from.
  CheckedCase(const Case& c, const CheckOptions& options, Pass pass = Pass::kForward);
  ~CheckedCase();

  const Problem& problem() const;

  // kernel "": the planner's choice. A refusal is wrong where the kernel is documented to take the
  // problem (documented.h), and so is a run where it is not.
  CaseResult run(const std::string& kernel);
  CaseResult run(const std::string& kernel, const Machine& here);

 private:
  std::string run_plan(const Plan& plan, const Machine& machine);

  const Case& case_;
  const CheckOptions& options_;
  std::unique_ptr<CaseData> data_;
  std::string failure_;            // why there is no data; empty: there is
  double share_of_tolerance_ = 0;  // of the last run
};

// What became of a kernel's cases.
struct Tally {
  int64_t checked = 0, refused = 0, wrong = 0;
  double worst_share = 0;  // of the tolerance

  void add(const CaseResult& result);
};

// A device's kernels of a pass that are to be run on a set of cases: the float64 oracle takes
// minutes on large ones.
std::vector<std::string> kernels_for(Device device, CaseSet set, Pass pass = Pass::kForward);

}  // namespace wh
