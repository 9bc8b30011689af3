#include "api/plan_log.h"

#include <fmt/format.h>

#include <cstdio>
#include <mutex>

#include "api/environment.h"
#include "core/byte_size.h"
#include "plan/units.h"

namespace wh {
namespace {

struct Receiver {
  // Held while `log` runs: no two lines at once, and once set_plan_log() has answered, the one
  // before is not running any more. Recursive, as `log` may call the library.
  std::recursive_mutex mutex;
  bool is_running = false;
  PlanLog log = nullptr;
  void* context = nullptr;
};

// While one lives, the callback runs; it may throw.
class Running {
 public:
  explicit Running(bool& flag) : flag_(flag) { flag_ = true; }
  ~Running() { flag_ = false; }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

 private:
  bool& flag_;
};

Receiver& receiver() {
  static Receiver one;
  return one;
}

std::string why(const Plan& plan) {
  if (!plan.limits.kernel.empty()) return "asked for by name";
  const Candidate* next = nullptr;
  for (const Candidate& one : plan.candidates) {
    if (one.verdict != Verdict::kSlower) continue;
    if (next == nullptr || one.estimated_us < next->estimated_us) next = &one;
  }
  if (next == nullptr) return "the only one that can";
  return fmt::format("then {}, {}", next->kernel, format_us(next->estimated_us));
}

}  // namespace

void set_plan_log(PlanLog log, void* context) {
  Receiver& to = receiver();
  const std::lock_guard lock(to.mutex);
  to.log = log;
  to.context = context;
}

std::string plan_line(const Plan& plan) {
  const std::string problem = describe(plan.problem);
  if (!plan.runnable()) return fmt::format("{}: no kernel is allowed", problem);
  return fmt::format("{}: {}, {} workspace, about {}; {}", problem, plan.kernel,
                     format_bytes(plan.workspace_bytes), format_us(plan.estimated_us), why(plan));
}

void log_plan(const Plan& plan) {
  Receiver& to = receiver();
  const std::lock_guard lock(to.mutex);
  if (to.is_running) return;  // a plan of the callback's own
  if (to.log != nullptr) {
    const std::string line = plan_line(plan);
    const Running running(to.is_running);
    to.log(to.context, line.c_str());
  } else if (environment().logs_plans()) {
    std::fprintf(stderr, "widehead: %s\n", plan_line(plan).c_str());
  }
}

}  // namespace wh
