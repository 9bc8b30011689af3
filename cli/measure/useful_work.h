// How much arithmetic and memory traffic a request is: what plan/work.h says of its shape, less the
// keys that its key lengths and key starts leave out.
#pragma once

#include "input/problem_flags.h"

namespace wh::cli {

double useful_flops(const Request& request);
double kv_bytes(const Request& request);

}  // namespace wh::cli
