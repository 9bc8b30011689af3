// widehead.merge: outputs and log-sum-exps of any library as the C API wants them.
#pragma once

#include "tensor.h"

namespace widehead_python {

// `parts`: a list of (out, log_sum_exp). Answers with a new pair of the first one's library, made
// by empty(out, shape, dtype) where that offers no allocator to C.
nb::tuple merge(const nb::list& parts, nb::handle sinks, nb::handle stream, nb::handle empty);

}  // namespace widehead_python
