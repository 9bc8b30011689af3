// Runs the program as a user would.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <string>

namespace wh {

struct Outcome {
  int code = -1;  // -1: ended by a signal
  std::string out, err;
};

// A shell command; its stderr is read too.
inline Outcome shell(const std::string& command) {
  // Tests run side by side: each process has files of its own.
  const std::string errors =
      testing::TempDir() + "widehead_errors_" + std::to_string(getpid()) + ".txt";
  FILE* pipe = popen(("{ " + command + "\n} 2>" + errors + " </dev/null").c_str(), "r");
  Outcome outcome;
  std::array<char, 4096> buffer;
  while (size_t count = fread(buffer.data(), 1, buffer.size(), pipe)) {
    outcome.out.append(buffer.data(), count);
  }
  const int status = pclose(pipe);
  outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  if (FILE* file = fopen(errors.c_str(), "r")) {
    while (size_t count = fread(buffer.data(), 1, buffer.size(), file)) {
      outcome.err.append(buffer.data(), count);
    }
    fclose(file);
    unlink(errors.c_str());
  }
  return outcome;
}

inline Outcome widehead(const std::string& arguments) {
  return shell(std::string(WIDEHEAD_CLI) + " " + arguments);
}

// The same with a Ctrl-C after so many seconds.
inline Outcome widehead_interrupted(const std::string& arguments, int seconds) {
  // Without --foreground the program gets the signal twice, of which the second ends it at once.
  return shell("timeout --foreground --preserve-status --signal=INT " + std::to_string(seconds) +
               " " + WIDEHEAD_CLI + " " + arguments);
}

}  // namespace wh
