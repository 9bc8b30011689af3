#include "parallel/stored_link.h"

#include <fmt/format.h>

#include <filesystem>
#include <fstream>

#include "api/profile_store.h"
#include "parallel/link.h"
#include "plan/backend.h"
#include "report/session.h"

namespace wh::cli {
namespace {

std::filesystem::path link_path(Device device) {
  const std::filesystem::path profile = profile_path(device, 0);
  if (profile.empty()) return {};
  return profile.parent_path() / fmt::format("link-{}.json", kDevices.name(device));
}

// Complete or not at all.
Status store(const std::filesystem::path& path, const Json& document) {
  std::error_code error;
  std::filesystem::create_directories(path.parent_path(), error);
  std::filesystem::path unfinished = path;
  unfinished += ".new";
  std::ofstream file(unfinished);
  file << document.dump(2) << "\n";
  file.close();
  if (file) std::filesystem::rename(unfinished, path, error);
  if (file && !error) return {};
  return {Code::kInternal, fmt::format("cannot write {}", path.string())};
}

}  // namespace

int tune_link(const Group& group, bool json) {
  const std::filesystem::path path = link_path(group.device);
  if (path.empty()) {
    return report(invalid("neither XDG_CACHE_HOME nor HOME says where profiles belong"));
  }
  const DeviceFacts& facts = backend(group.device).facts(group.device_index);
  if (!facts.unavailable.empty()) return report({Code::kRefused, facts.unavailable});
  return run_ranks(
      group, [&](sharded::Communicator& communicator, int32_t device_index) -> Result<int> {
        if (communicator.ranks() == 1) return invalid("--ranks is 1; a link takes at least 2");
        const auto link = sharded::measure_link(
            communicator, {group.device, device_index, facts.read_gbytes_per_s},
            std::chrono::seconds(30));
        if (!link.ok()) return link.status();
        if (communicator.rank() > 0) return kFine;
        const Json document{
            {"device", facts.name},           {"transport", kTransports.name(group.transport)},
            {"ranks", communicator.ranks()},  {"gbytes_per_s", link->gbytes_per_s},
            {"latency_us", link->latency_us}, {"measured_on", today()}};
        WH_RETURN_IF_ERROR(store(path, document));
        if (json) {
          fmt::print(answers(), "{}\n", document.dump(2));
        } else {
          fmt::print(answers(),
                     "--link {:.3g}GB/s,{:.3g}us between {} ranks of {}; plans use it from now on: "
                     "{}\n",
                     link->gbytes_per_s, link->latency_us, communicator.ranks(),
                     kTransports.name(group.transport), path.string());
        }
        return kFine;
      });
}

std::optional<StoredLink> stored_link(Device device, double memory_gbytes_per_s) {
  std::ifstream file(link_path(device));
  if (!file) return std::nullopt;
  const Json document = Json::parse(file, nullptr, false);
  if (!document.is_object()) return std::nullopt;
  const auto number = [&](const char* name) {
    const auto found = document.find(name);
    return found != document.end() && found->is_number() ? found->get<double>() : -1;
  };
  const auto text = [&](const char* name) {
    const auto found = document.find(name);
    return found != document.end() && found->is_string() ? found->get<std::string>() : "";
  };
  StoredLink stored{{number("gbytes_per_s"), number("latency_us"), memory_gbytes_per_s},
                    fmt::format("measured {} between {} ranks of {}", text("measured_on"),
                                number("ranks"), text("transport"))};
  if (!(stored.link.gbytes_per_s > 0) || !(stored.link.latency_us >= 0) ||
      text("device") != backend(device).facts(0).name) {
    return std::nullopt;
  }
  return stored;
}

}  // namespace wh::cli
