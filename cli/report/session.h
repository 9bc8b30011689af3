// What every verb shares: output, exit codes, errors.
#pragma once

#include <chrono>
#include <cstdio>
#include <functional>
#include <string>

#include "core/status.h"
#include "input/embedded.h"

namespace CLI {
class App;
}

namespace wh::cli {

enum ExitCode {
  kFine = 0,
  kWrongNumbers = 1,
  kBadUsage = 2,
  kNoKernel = 3,
  kDeviceFailed = 4,
};

// The exit code that a status means.
int exit_code(const Status& status);

// Prints "widehead: message" on stderr and answers with the exit code.
int report(const Status& status);

// Where answers are printed: stdout.
std::FILE* answers();

// Keeps stdout for answers, of libraries that log there: for as long as this lives, what else is
// written to it goes to stderr. NCCL_DEBUG_FILE is no help: NCCL reads it for some levels only, and
// would empty a file that stderr is.
class KeptStdout {
 public:
  KeptStdout();
  ~KeptStdout();
  KeptStdout(const KeptStdout&) = delete;
  KeptStdout& operator=(const KeptStdout&) = delete;

 private:
  std::FILE* mine_ = nullptr;  // where another keeps it already, none
};

// "2026-11-29", of UTC.
std::string today();

// A check for CLI11: the flags' texts are empty where they were not given, so nobody may give that.
std::string refuse_empty(const std::string& text);

// A line that is rewritten in place on a terminal and silent elsewhere; on stderr, so that stdout
// stays a table or a document.
class ProgressLine {
 public:
  explicit ProgressLine(bool enabled);
  ~ProgressLine();
  void show(const std::string& text);

 private:
  bool is_shown_;
  size_t width_ = 0;
};

// "[====      ]"
std::string progress_bar(double done, double total);

// From now on the first Ctrl-C is only noted, so that what is done can be kept; the second ends the
// process as ever.
void note_interrupts();
bool is_interrupted();

// Shows a run as a bar once it has taken a second, and lets Ctrl-C cancel it.
class RunProgress {
 public:
  RunProgress() { note_interrupts(); }
  // Progress::Callback with a RunProgress as context.
  static int32_t report(void* self, double fraction);

 private:
  ProgressLine line_{true};
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
  int shown_percent_ = -1;
};

// Each verb adds its subcommand and leaves in `action` what to do when it is the one called.
using Action = std::function<int()>;
void add_plan(CLI::App& app, Action& action);
void add_run(CLI::App& app, Action& action);
void add_check(CLI::App& app, Action& action);
void add_bench(CLI::App& app, Action& action);
void add_tune(CLI::App& app, Action& action);
void add_list(CLI::App& app, Action& action);

}  // namespace wh::cli
