// widehead check: the case table against float64.
#include <fmt/format.h>

#include <map>
#include <memory>

#include "api/machine.h"
#include "core/names.h"
#include "core/nearest_name.h"
#include "run_case.h"
#include "session.h"

namespace wh::cli {
namespace {

struct CheckFlags {
  std::string cases = "smoke", kernel, device = "cpu";
  uint64_t seed = 1;
  bool json = false;
};

struct Tally {
  int64_t checked = 0, refused = 0, wrong = 0;
  double worst_share = 0;  // of the tolerance
};

int run_check(const CheckFlags& flags) {
  constexpr Names<CaseSet, 4> kSets{{"smoke", "ci", "full", "corner"}};
  const auto set = kSets.value(flags.cases);
  if (!set) {
    return report(invalid(fmt::format("--cases is \"{}\"; valid: {}", flags.cases, kSets.list())));
  }
  const auto device = kDevices.value(flags.device);
  if (!device) {
    return report(
        invalid(fmt::format("--device is \"{}\"; valid: {}", flags.device, kDevices.list())));
  }
  if (*device == Device::kCuda && !cuda_facts(0).unavailable.empty()) {
    return report({Code::kRefused, cuda_facts(0).unavailable});
  }
  std::vector<std::string> kernels;
  for (const Kernel* kernel : kernels_of(*device)) kernels.push_back(kernel->name);
  if (!flags.kernel.empty()) {
    if (find_kernel(kernels_of(*device), flags.kernel) == nullptr) {
      return report(invalid(fmt::format("--kernel is \"{}\"; did you mean \"{}\"?", flags.kernel,
                                        nearest_name(flags.kernel, kernels))));
    }
    kernels = {flags.kernel};
  }
  std::map<std::string, Tally> tallies;
  Json wrong = Json::array();
  const std::vector<Case> cases = make_cases(*set, *device, flags.seed);
  ProgressLine line(!flags.json);
  for (size_t i = 0; i < cases.size(); ++i) {
    if (i % 16 == 0) line.show(fmt::format("case {} of {}", i, cases.size()));
    CaseData data(cases[i]);
    const Expected expected = expected_answer(data);
    for (const std::string& kernel : kernels) {
      const CaseResult result = run_case(cases[i], data, expected, kernel);
      Tally& tally = tallies[kernel];
      ++(result.was_refused ? tally.refused : tally.checked);
      if (result.tolerance > 0) {
        tally.worst_share = std::max(tally.worst_share, result.relative_rms / result.tolerance);
      }
      if (!result.is_wrong()) continue;
      ++tally.wrong;
      wrong.push_back({{"case", cases[i].name}, {"kernel", kernel}, {"message", result.message}});
    }
  }
  line.show("");
  if (flags.json) {
    Json rows = Json::array();
    for (const auto& [kernel, tally] : tallies) {
      rows.push_back({{"kernel", kernel},
                      {"checked", tally.checked},
                      {"refused", tally.refused},
                      {"wrong", tally.wrong},
                      {"worst_share_of_tolerance", tally.worst_share}});
    }
    fmt::print("{}\n", Json{{"cases", flags.cases}, {"kernels", rows}, {"wrong", wrong}}.dump(2));
  } else {
    fmt::print("{:<18} {:>8} {:>8} {:>6}  worst error, of its tolerance\n", "kernel", "checked",
               "refused", "wrong");
    for (const auto& [kernel, tally] : tallies) {
      fmt::print("{:<18} {:>8} {:>8} {:>6}  {:.2f}\n", kernel, tally.checked, tally.refused,
                 tally.wrong, tally.worst_share);
    }
    for (const Json& one : wrong) {
      fmt::print("wrong: {} on {}\n  {}\n", one["kernel"].get<std::string>(),
                 one["case"].get<std::string>(), one["message"].get<std::string>());
    }
  }
  return wrong.empty() ? kFine : kWrongNumbers;
}

}  // namespace

void add_check(CLI::App& app, Action& action) {
  auto flags = std::make_shared<CheckFlags>();
  CLI::App* verb = app.add_subcommand("check", "Compare the kernels with float64 on many cases");
  verb->add_option("--cases", flags->cases, "smoke, ci, full or corner");
  verb->add_option("--kernel", flags->kernel, "only this one");
  verb->add_option("--device", flags->device, "cpu or cuda");
  verb->add_option("--seed", flags->seed, "of the cases");
  verb->add_flag("--json", flags->json, "print one JSON document");
  verb->callback([flags, &action] { action = [flags] { return run_check(*flags); }; });
}

}  // namespace wh::cli
