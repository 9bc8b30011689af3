#include "report/session.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <ctime>

namespace wh::cli {
namespace {

volatile std::sig_atomic_t interrupted = 0;

std::FILE* kept_stdout = nullptr;

}  // namespace

int exit_code(const Status& status) {
  switch (status.code()) {
    case Code::kOk:
      return kFine;
    case Code::kInvalidArgument:
      return kBadUsage;
    case Code::kRefused:
      return kNoKernel;
    case Code::kOutOfMemory:
    case Code::kDeviceError:
    case Code::kCancelled:
    case Code::kInternal:
      break;
  }
  return kDeviceFailed;
}

std::FILE* answers() { return kept_stdout != nullptr ? kept_stdout : stdout; }

KeptStdout::KeptStdout() {
  if (kept_stdout != nullptr) return;
  std::fflush(stdout);
  const int kept = dup(STDOUT_FILENO);
  if (kept < 0) return;
  mine_ = kept_stdout = fdopen(kept, "w");
  if (mine_ == nullptr) {
    close(kept);
    return;
  }
  dup2(STDERR_FILENO, STDOUT_FILENO);
}

KeptStdout::~KeptStdout() {
  if (mine_ == nullptr) return;
  std::fflush(stdout);
  std::fflush(mine_);
  dup2(fileno(mine_), STDOUT_FILENO);
  std::fclose(mine_);
  kept_stdout = nullptr;
}

std::string today() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[16];
  std::strftime(text, sizeof(text), "%Y-%m-%d", &parts);
  return text;
}

int report(const Status& status) {
  std::fprintf(stderr, "widehead: %s\n", status.message().c_str());
  return exit_code(status);
}

std::string refuse_empty(const std::string& text) {
  return text.empty() ? "it is empty; leave the flag out or give it a value" : "";
}

std::string progress_bar(double done, double total) {
  constexpr int kCells = 40;
  const int filled = static_cast<int>(kCells * std::clamp(done / total, 0.0, 1.0));
  return fmt::format("[{:=<{}}{:<{}}]", "", filled, "", kCells - filled);
}

void note_interrupts() {
  struct sigaction action {};
  action.sa_handler = [](int) { interrupted = 1; };
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  sigaction(SIGINT, &action, nullptr);
}

bool is_interrupted() { return interrupted != 0; }

ProgressLine::ProgressLine(bool enabled) : is_shown_(enabled && isatty(STDERR_FILENO) != 0) {}

ProgressLine::~ProgressLine() { show(""); }

void ProgressLine::show(const std::string& text) {
  if (!is_shown_) return;
  std::fprintf(stderr, "\r%-*s\r%s", static_cast<int>(width_), "", text.c_str());
  std::fflush(stderr);
  width_ = text.size();
}

int32_t RunProgress::report(void* self, double fraction) {
  auto& progress = *static_cast<RunProgress*>(self);
  const int percent = static_cast<int>(fraction * 100);
  // A run may report thousands of times a second.
  if (percent != progress.shown_percent_ &&
      std::chrono::steady_clock::now() - progress.begin_ > std::chrono::seconds(1)) {
    progress.line_.show(fmt::format("{} {:3} %", progress_bar(fraction, 1), percent));
    progress.shown_percent_ = percent;
  }
  return is_interrupted() ? 1 : 0;
}

}  // namespace wh::cli
