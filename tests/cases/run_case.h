// Runs one case on one kernel and says what was wrong.
#pragma once

#include "case_data.h"

namespace wh {

struct CaseResult {
  std::string kernel;
  bool was_refused = false;  // with the reason in message
  double relative_rms = 0;
  double tolerance = 0;
  std::string message;  // empty: right

  bool is_wrong() const { return !was_refused && !message.empty(); }
};

// kernel "": the planner's choice.
CaseResult run_case(const Case& c, CaseData& data, const Expected& expected,
                    const std::string& kernel);

}  // namespace wh
