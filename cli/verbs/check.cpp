// widehead check: the case table against float64.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <map>
#include <memory>

#include "api/machine.h"
#include "core/names.h"
#include "core/nearest_name.h"
#include "input/number_flag.h"
#include "report/session.h"
#include "run_case.h"

namespace wh::cli {
namespace {

constexpr Names<CaseSet, 7> kSets{{"smoke", "ci", "full", "layouts", "ragged", "corner", "large"}};

struct CheckFlags {
  std::string cases = "smoke", kernels, device = "cpu";
  uint64_t seed = 1;
  int64_t shrink = 1;
  double seconds = 0;  // 0: until all is done
  bool leaves_workspace = false;
  bool is_backward = false, json = false, is_verbose = false;
  CheckOptions options;

  Pass pass() const { return is_backward ? Pass::kBackward : Pass::kForward; }
};

Result<std::vector<std::string>> kernels_of_flags(const CheckFlags& flags, Device device,
                                                  CaseSet set) {
  std::vector<std::string> all, names;
  for (const Kernel* kernel : kernels_of(device)) {
    if (kernel->pass == flags.pass()) all.push_back(kernel->name);
  }
  if (all.empty()) {
    return Status(Code::kRefused,
                  fmt::format("--device {} has no kernel of the backward pass", flags.device));
  }
  if (flags.kernels.empty()) return kernels_for(device, set, flags.pass());
  for (size_t begin = 0; begin < flags.kernels.size();) {
    const size_t end = std::min(flags.kernels.find(',', begin), flags.kernels.size());
    names.push_back(flags.kernels.substr(begin, end - begin));
    if (std::find(all.begin(), all.end(), names.back()) == all.end()) {
      return invalid(fmt::format("--kernel names \"{}\"; did you mean \"{}\"?", names.back(),
                                 nearest_name(names.back(), all)));
    }
    begin = end + 1;
  }
  return names;
}

class Check {
 public:
  Check(const CheckFlags& flags, Device device) : flags_(flags), device_(device) {}

  int run(CaseSet set, const std::vector<std::string>& kernels) {
    const std::vector<Case> cases = set == CaseSet::kLarge
                                        ? make_large_cases(device_, flags_.seed, flags_.shrink)
                                        : make_cases(set, device_, flags_.seed);
    for (const std::string& kernel : kernels) tallies_[kernel];
    case_count_ = static_cast<int64_t>(cases.size());
    ProgressLine line(!flags_.json);
    const auto begin = std::chrono::steady_clock::now();
    const auto seconds = [&] {
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    };
    for (const Case& c : cases) {
      if (flags_.seconds > 0 && seconds() > flags_.seconds) break;
      if (set == CaseSet::kLarge || cases_run_ % 16 == 0) {
        line.show(fmt::format("case {} of {}: {}", cases_run_ + 1, cases.size(), c.name));
      }
      CheckedCase checked(c, flags_.options, flags_.pass());
      for (const std::string& kernel : kernels) {
        // A kernel that hangs or brings the device down shows as the last one.
        if (flags_.is_verbose) fmt::print(stderr, "runs {} on {}\n", kernel, c.name);
        record(c, kernel, checked.run(kernel));
        if (!device_failure_.empty()) break;
      }
      if (!device_failure_.empty()) break;
      ++cases_run_;
    }
    seconds_ = seconds();
    line.show("");
    if (flags_.json) {
      fmt::print("{}\n", document().dump(2));
    } else {
      print();
    }
    return wrong_.empty() ? kFine : kWrongNumbers;
  }

 private:
  void record(const Case& c, const std::string& kernel, const CaseResult& result) {
    tallies_[kernel].add(result);
    if (result.outcome != Outcome::kWrong) return;
    wrong_.push_back({{"case", c.name}, {"kernel", kernel}, {"message", result.message}});
    // After a fault on the device every further call fails: those are no kernel's mistakes.
    if (Status status = backend(device_).synchronize({}); !status.ok()) {
      device_failure_ = status.message();
    }
  }

  Json document() const {
    Json rows = Json::array();
    int64_t checked = 0;
    for (const auto& [kernel, tally] : tallies_) {
      checked += tally.checked;
      rows.push_back({{"kernel", kernel},
                      {"checked", tally.checked},
                      {"refused", tally.refused},
                      {"wrong", tally.wrong},
                      {"worst_share_of_tolerance", tally.worst_share}});
    }
    Json document{{"cases", flags_.cases},
                  {"pass", kPasses.name(flags_.pass())},
                  {"device", backend(device_).facts(0).name},
                  {"seed", flags_.seed},
                  {"runs", flags_.options.runs},
                  {"case_count", case_count_},
                  {"cases_run", cases_run_},
                  {"seconds", seconds_},
                  {"checked", checked},
                  {"kernels", rows},
                  {"wrong", wrong_}};
    if (!device_failure_.empty()) document["device_failed"] = device_failure_;
    return document;
  }

  void print() const {
    fmt::print("{:<23} {:>8} {:>8} {:>6}  worst error, of its tolerance\n", "kernel", "checked",
               "refused", "wrong");
    for (const auto& [kernel, tally] : tallies_) {
      fmt::print("{:<23} {:>8} {:>8} {:>6}  {:.2f}\n", kernel, tally.checked, tally.refused,
                 tally.wrong, tally.worst_share);
    }
    if (cases_run_ < case_count_) {
      fmt::print("stopped after {:.0f} s: {} of {} cases{}{}\n", seconds_, cases_run_, case_count_,
                 device_failure_.empty() ? "" : "; ", device_failure_);
    }
    for (const Json& one : wrong_) {
      fmt::print("wrong: {} on {}\n  {}\n", one["kernel"].get<std::string>(),
                 one["case"].get<std::string>(), one["message"].get<std::string>());
    }
  }

  const CheckFlags& flags_;
  Device device_;
  std::map<std::string, Tally> tallies_;
  Json wrong_ = Json::array();
  std::string device_failure_;  // after which nothing runs; empty: none
  int64_t case_count_ = 0, cases_run_ = 0;
  double seconds_ = 0;
};

int run_check(CheckFlags flags) {
  const auto set = kSets.value(flags.cases);
  if (!set) {
    return report(invalid(fmt::format("--cases is \"{}\"; valid: {}", flags.cases, kSets.list())));
  }
  const auto device = kDevices.value(flags.device);
  if (!device) {
    return report(
        invalid(fmt::format("--device is \"{}\"; valid: {}", flags.device, kDevices.list())));
  }
  if (flags.shrink > 1 && *set != CaseSet::kLarge) {
    return report(invalid(
        fmt::format("--shrink is {}; it is for --cases large alone, and else 1", flags.shrink)));
  }
  const DeviceFacts& facts = backend(*device).facts(0);
  if (!facts.unavailable.empty()) return report({Code::kRefused, facts.unavailable});
  const auto kernels = kernels_of_flags(flags, *device, *set);
  if (!kernels.ok()) return report(kernels.status());
  flags.options.paints_workspace = !flags.leaves_workspace;
  return Check(flags, *device).run(*set, *kernels);
}

}  // namespace

void add_check(CLI::App& app, Action& action) {
  auto flags = std::make_shared<CheckFlags>();
  CLI::App* verb = app.add_subcommand("check", "Compare the kernels with float64 on many cases");
  verb->add_option("--cases", flags->cases, "smoke, ci, full, layouts, ragged, corner or large");
  verb->add_flag("--backward", flags->is_backward, "the kernels of the backward pass");
  verb->add_option("--kernel", flags->kernels, "only these: A,B");
  verb->add_option("--device", flags->device, "cpu or cuda");
  add_number_flag(*verb, "--seed", flags->seed, kSeeds, "of the cases");
  add_number_flag(*verb, "--shrink", flags->shrink, kCounts,
                  "divide the lengths of large cases by this");
  add_number_flag(*verb, "--runs", flags->options.runs, kCounts,
                  "of each kernel; all must give the same bits");
  add_number_flag(*verb, "--shared-bytes", flags->options.shared_bytes, kBytes,
                  "plan as if a block of the card had so much shared memory");
  add_number_flag(*verb, "--seconds", flags->seconds, kSeconds, "stop after the case in hand then");
  verb->add_flag("--leave-workspace", flags->leaves_workspace,
                 "do not paint it, so that a sanitizer sees what is read before it is written");
  verb->add_flag("--verbose", flags->is_verbose, "say on stderr what runs, before it does");
  verb->add_flag("--json", flags->json, "print one JSON document");
  verb->callback([flags, &action] { action = [flags] { return run_check(*flags); }; });
}

}  // namespace wh::cli
