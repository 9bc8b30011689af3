// Linked into every test program: whoever runs the tests may have tuned this machine, which changes
// what is chosen.
#include <cstdlib>

namespace {
[[maybe_unused]] const int kSet = setenv("XDG_CACHE_HOME", "/nonexistent", 1);
}  // namespace
