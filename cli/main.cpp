// widehead: plan, run, check, measure and tune attention from a shell.
#include <CLI/CLI.hpp>
#include <cstdio>

#include "core/nearest_name.h"
#include "report/session.h"

namespace {

using wh::cli::Action;

// The verbs that take a flag: "run, check".
std::string verbs_with(const CLI::App& app, const std::string& flag) {
  std::string names;
  for (const CLI::App* verb : app.get_subcommands([](const CLI::App*) { return true; })) {
    if (verb->get_option_no_throw(flag) == nullptr) continue;
    names += (names.empty() ? "" : ", ") + verb->get_name();
  }
  return names;
}

// CLI11 says which argument it does not know; this says what was perhaps meant.
std::string suggestion(const CLI::App& app, const std::vector<std::string>& arguments) {
  const auto verbs = app.get_subcommands([](const CLI::App* verb) { return verb->parsed(); });
  std::vector<std::string> names;
  if (verbs.empty()) {
    for (const CLI::App* verb : app.get_subcommands([](const CLI::App*) { return true; })) {
      names.push_back(verb->get_name());
    }
  } else {
    for (const CLI::Option* option : verbs.front()->get_options()) {
      names.push_back(option->get_name(false));
    }
  }
  for (const std::string& argument : arguments) {
    if (!verbs.empty() && !argument.starts_with("--")) continue;
    const std::string name = argument.substr(0, argument.find('='));
    if (!verbs.empty() && verbs.front()->get_name() == "plan" && name == "--parallel") {
      return "; plan starts no ranks, --ranks says how many there would be";
    }
    if (const std::string others = verbs_with(app, name); !others.empty()) {
      return "; " + name + " is of " + others;
    }
    return "; did you mean " + wh::nearest_name(name, names) + "?";
  }
  return "";
}

int main_guarded(int argc, char** argv) {
  CLI::App app{"Exact attention for any head dimension, planned before it runs."};
  app.name("widehead");
  app.set_version_flag("--version", WIDEHEAD_VERSION);
  app.require_subcommand(1);
  Action action;
  wh::cli::add_plan(app, action);
  wh::cli::add_run(app, action);
  wh::cli::add_check(app, action);
  wh::cli::add_bench(app, action);
  wh::cli::add_tune(app, action);
  wh::cli::add_list(app, action);
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp& help) {
    return app.exit(help);
  } catch (const CLI::CallForVersion& version) {
    return app.exit(version);
  } catch (const CLI::ParseError& error) {
    const std::vector<std::string> unknown = app.remaining(true);
    std::string message = error.what();
    if (argc > 1 && dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr) {
      // CLI11's own words have them last one first.
      message = "not expected: " + CLI::detail::join(unknown, " ") + suggestion(app, unknown);
    } else if (dynamic_cast<const CLI::RequiredError*>(&error) != nullptr &&
               app.get_subcommands().empty()) {
      message = argc > 1
                    ? std::string("\"") + argv[1] + "\" is no verb" + suggestion(app, {argv[1]})
                    : "a verb is missing; valid: plan, run, check, bench, tune, list";
    }
    std::fprintf(stderr, "widehead: %s\n`widehead --help` and `widehead VERB --help` say more.\n",
                 message.c_str());
    return wh::cli::kBadUsage;
  }
  return action();
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return main_guarded(argc, argv);
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "widehead: not enough memory\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "widehead: %s\n", error.what());
  }
  return wh::cli::kDeviceFailed;
}
