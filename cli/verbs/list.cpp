// widehead list: kernels, models, suites, devices.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>

#include "api/machine.h"
#include "api/profile_store.h"
#include "core/names.h"
#include "core/nearest_name.h"
#include "plan/names.h"
#include "report/session.h"

namespace wh::cli {
namespace {

struct ListFlags {
  std::string what;
  bool json = false;
};

Json list_kernels() {
  Json rows = Json::array();
  for (const Device device : kDevices.values()) {
    for (const Kernel* kernel : kernels_of(device)) {
      rows.push_back({{"kernel", kernel->name},
                      {"device", kDevices.name(device)},
                      {"fused", kernel->is_fused()},
                      {"role", kRoles.name(kernel->role)},
                      {"pass", kPasses.name(kernel->pass)},
                      {"summary", kernel->summary}});
    }
  }
  return rows;
}

Json list_models() {
  Json rows = Json::array();
  for (const auto& [name, model] : models().items()) {
    for (const Json& layer : model["layers"]) {
      Json row{{"model", name}};
      for (const auto& [field, value] : layer.items()) row[field] = value;
      row["source"] = model["source"];
      rows.push_back(row);
    }
  }
  return rows;
}

Json list_suites() {
  Json rows = Json::array();
  for (const auto& [name, suite] : suites().items()) {
    rows.push_back({{"suite", name}, {"summary", suite["summary"]}});
  }
  return rows;
}

Json list_devices() {
  Json rows = Json::array();
  for (const Device device : kDevices.values()) {
    const Backend& kind = backend(device);
    if (const std::string& reason = kind.facts(0).unavailable; !reason.empty()) {
      rows.push_back({{"device", kDevices.name(device)}, {"name", "-"}, {"kernels_use", reason}});
      continue;
    }
    for (int32_t i = 0; kind.facts(i).unavailable.empty(); ++i) {
      Json row{{"device", device_name(device, i)},
               {"name", kind.facts(i).name},
               {"kernels_use", kind.facts(i).kernels_use},
               {"cores", kind.identity(i).threads},
               {"estimates", loaded_profile(device, i).description}};
      for (const auto& [name, text] : kind.build_facts(i)) row[name] = text;
      rows.push_back(std::move(row));
      if (kind.is_host()) break;  // it is one
    }
  }
  return rows;
}

std::string cell(const Json& row, const std::string& column) {
  if (!row.contains(column)) return "";
  const Json& value = row[column];
  return value.is_string() ? value.get<std::string>() : value.dump();
}

// Columns are the fields of all rows, as wide as their widest cell.
void print_table(const Json& rows) {
  std::vector<std::string> columns;
  for (const Json& row : rows) {
    for (const auto& [name, value] : row.items()) {
      if (std::find(columns.begin(), columns.end(), name) == columns.end()) columns.push_back(name);
    }
  }
  std::vector<size_t> widths;
  for (const std::string& column : columns) {
    size_t width = column.size();
    for (const Json& row : rows) width = std::max(width, cell(row, column).size());
    widths.push_back(width);
  }
  const auto print_row = [&](const auto& text_of) {
    std::string line;
    for (size_t i = 0; i < columns.size(); ++i) {
      line += fmt::format("{:<{}}  ", text_of(columns[i]), widths[i]);
    }
    fmt::print("{}\n", line.substr(0, line.find_last_not_of(' ') + 1));
  };
  print_row([](const std::string& column) { return column; });
  for (const Json& row : rows) {
    print_row([&](const std::string& column) { return cell(row, column); });
  }
}

int run_list(const ListFlags& flags) {
  const std::vector<std::pair<std::string, Json (*)()>> lists{{"kernels", list_kernels},
                                                              {"models", list_models},
                                                              {"suites", list_suites},
                                                              {"devices", list_devices}};
  std::vector<std::string> names;
  for (const auto& [name, list] : lists) {
    names.push_back(name);
    if (name != flags.what) continue;
    const Json rows = list();
    if (flags.json) {
      fmt::print("{}\n", rows.dump(2));
    } else {
      print_table(rows);
    }
    return kFine;
  }
  if (flags.what.empty()) {
    return report(invalid("what to list is missing; valid: kernels, models, suites, devices"));
  }
  return report(
      invalid(fmt::format("there is no list of \"{}\"; did you mean {}? valid: kernels, "
                          "models, suites, devices",
                          flags.what, nearest_name(flags.what, names))));
}

}  // namespace

void add_list(CLI::App& app, Action& action) {
  auto flags = std::make_shared<ListFlags>();
  CLI::App* verb = app.add_subcommand("list", "List kernels, models, suites or devices");
  verb->add_option("what", flags->what, "kernels, models, suites or devices");
  verb->add_flag("--json", flags->json, "print one JSON document");
  verb->callback([flags, &action] { action = [flags] { return run_list(*flags); }; });
}

}  // namespace wh::cli
