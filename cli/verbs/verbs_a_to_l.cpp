// Verbs that are compiled together: four files with CLI11 take 30 s so, 25 s each alone. A file of
// its own instead of CMake's, which would lie in the build folder, where ccache takes it for
// another one in the Python wheel's build.
#include "input/limits_flags.cpp"  // NOLINT(bugprone-suspicious-include)
#include "verbs/bench.cpp"         // NOLINT(bugprone-suspicious-include)
#include "verbs/check.cpp"         // NOLINT(bugprone-suspicious-include)
#include "verbs/list.cpp"          // NOLINT(bugprone-suspicious-include)
