// Whose threads the calls of this process run on.
#pragma once

#include <widehead/widehead.h>

namespace widehead_python {

// From now on those of PyTorch, which must be loaded. False where its OpenMP offers no entry for
// them, and in a forked process.
bool use_torch_threads();

// What the calls' options take; null: the library's own.
const wh_executor* executor();

}  // namespace widehead_python
