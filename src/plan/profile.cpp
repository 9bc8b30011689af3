#include "plan/profile.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/json_reader.h"
#include "core/names.h"
#include "plan/work.h"

namespace wh {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kFormatVersion = 1;
constexpr size_t kMostPoints = 100000;
constexpr float kMostLog2Ratio = 10;  // a factor of a thousand is no measurement

bool is_plausible(const CostPoint& point) { return std::fabs(point.log2_ratio) < kMostLog2Ratio; }

float log2_of(int64_t value) { return std::log2(static_cast<float>(std::max<int64_t>(1, value))); }

// Squared distance. A doubling of the width changes a kernel's rate more than one of the length,
// and another type is another conversion: worth two doublings.
float distance(const CostFeatures& a, const CostFeatures& b) {
  const auto square = [](float x) { return x * x; };
  return square(a.rows - b.rows) + square(a.keys - b.keys) + 2 * square(a.width - b.width) +
         square(a.heads - b.heads) / 2 + square(a.visible - b.visible) +
         (a.dtype_kv == b.dtype_kv ? 0.0f : 4.0f);
}

}  // namespace

void Profile::add(const std::string& kernel, const CostPoint& point) {
  if (is_plausible(point)) points_[kernel].push_back(point);
}

CostFeatures CostFeatures::of(const Problem& p) {
  const double pairs = static_cast<double>(p.len_q) * static_cast<double>(p.len_k);
  const double visible = pairs > 0 ? visible_pairs(p) / pairs : 1;
  return {log2_of(p.len_q * p.group()),
          log2_of(p.len_k),
          log2_of(p.dim_qk + p.dim_v),
          log2_of(p.batch * p.heads_kv),
          static_cast<float>(std::log2(std::max(visible, 0x1p-20))),
          p.dtype_kv};
}

std::string difference(const ProfileIdentity& then, const ProfileIdentity& now) {
  const auto differs = [](const char* what, const auto& before, const auto& after) {
    return fmt::format("{}: {} then, {} now", what, before, after);
  };
  if (then.device != now.device) return differs("device", then.device, now.device);
  if (then.isa != now.isa) return differs("instruction set", then.isa, now.isa);
  if (then.driver != now.driver) return differs("driver", then.driver, now.driver);
  if (then.threads != now.threads) return differs("threads", then.threads, now.threads);
  if (then.library_version != now.library_version) {
    return differs("library version", then.library_version, now.library_version);
  }
  return "";
}

// Inverse-distance weighting (Shepard 1968) with power 4: close points decide, and a point that is
// met exactly decides alone. The formula itself counts as a point at kTrusted, four doublings of
// rows and of keys away: from 16 keys nothing follows for 262,144.
double Profile::correction(const std::string& kernel, const CostFeatures& at) const {
  const auto found = points_.find(kernel);
  if (found == points_.end()) return 1;
  constexpr double kTrusted = 32;
  double sum = 0, weights = 1 / (kTrusted * kTrusted);
  for (const CostPoint& point : found->second) {
    const double d = distance(at, point.at) + 1e-3;
    const double weight = 1 / (d * d);
    sum += weight * point.log2_ratio;
    weights += weight;
  }
  return std::exp2(sum / weights);
}

// A cost a line, so that two profiles can be compared.
std::string Profile::to_json() const {
  const auto text_of = [](const Json& json, int indent) {
    return json.dump(indent, ' ', false, Json::error_handler_t::replace);
  };
  const Json head{{"format", kFormatVersion},     {"device", identity_.device},
                  {"isa", identity_.isa},         {"driver", identity_.driver},
                  {"threads", identity_.threads}, {"library_version", identity_.library_version},
                  {"measured_on", measured_on_}};
  std::string text = text_of(head, 1);
  text.erase(text.rfind("\n}"));
  text += ",\n \"kernels\": {";
  const char* before_kernel = "";
  for (const auto& [kernel, points] : points_) {
    text += fmt::format("{}\n  {}: [", before_kernel, text_of(kernel, -1));
    const char* before_point = "";
    for (const CostPoint& point : points) {
      const Json row{
          {"rows_log2", point.at.rows},       {"keys_log2", point.at.keys},
          {"width_log2", point.at.width},     {"heads_log2", point.at.heads},
          {"visible_log2", point.at.visible}, {"kv_dtype", kDtypes.name(point.at.dtype_kv)},
          {"ratio_log2", point.log2_ratio}};
      text += fmt::format("{}\n   {}", before_point, text_of(row, -1));
      before_point = ",";
    }
    text += "\n  ]";
    before_kernel = ",";
  }
  return text + "\n }\n}\n";
}

Result<Profile> Profile::from_json(const std::string& text) {
  const JsonDocument document(text);
  if (!document.is_valid()) return invalid("the profile is not JSON");
  try {
    const JsonReader reader(document.root(), "profile");
    int32_t format = 0;
    reader.read("format", format);
    if (format != kFormatVersion) {
      return invalid(
          fmt::format("profile.format is {}; this version reads {}", format, kFormatVersion));
    }
    Profile profile;
    reader.read("device", profile.identity_.device);
    reader.read("isa", profile.identity_.isa);
    reader.read("driver", profile.identity_.driver);
    reader.read("threads", profile.identity_.threads);
    reader.read("library_version", profile.identity_.library_version);
    reader.read("measured_on", profile.measured_on_);
    const nlohmann::json& kernels = reader.member("kernels");
    if (!kernels.is_object()) return invalid("profile.kernels is not an object");
    size_t count = 0;
    for (const auto& [kernel, rows] : kernels.items()) {
      if (!rows.is_array()) return invalid("profile.kernels." + kernel + " is not an array");
      for (const nlohmann::json& row : rows) {
        if (++count > kMostPoints) return invalid("the profile has too many points");
        const JsonReader point_reader(row, "profile.kernels." + kernel);
        CostPoint point;
        point_reader.read("rows_log2", point.at.rows);
        point_reader.read("keys_log2", point.at.keys);
        point_reader.read("width_log2", point.at.width);
        point_reader.read("heads_log2", point.at.heads);
        point_reader.read("visible_log2", point.at.visible);
        point_reader.read("kv_dtype", kDtypes, point.at.dtype_kv);
        point_reader.read("ratio_log2", point.log2_ratio);
        if (!is_plausible(point)) {
          return invalid(fmt::format("profile.kernels.{}.ratio_log2 is not between {} and {}",
                                     kernel, -kMostLog2Ratio, kMostLog2Ratio));
        }
        profile.add(kernel, point);
      }
    }
    return profile;
  } catch (const MalformedJson& error) {
    return invalid("the profile is malformed: " + error.message);
  }
}

}  // namespace wh
