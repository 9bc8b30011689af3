// How much arithmetic and memory traffic a request is: what plan/work.h says of its shape, with
// the queries and keys that each sequence has.
#pragma once

#include "input/problem_flags.h"

namespace wh::cli {

double useful_flops(const Request& request);
double kv_bytes(const Request& request);

}  // namespace wh::cli
