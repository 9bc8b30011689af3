#pragma once

#include "tensor.h"

namespace widehead_python {

// Runs wh_append() on caches of k and v, which may be widehead.Quantised.
void append(nb::handle k, nb::handle v, nb::handle new_k, nb::handle new_v, nb::handle slots,
            nb::handle stream);

}  // namespace widehead_python
