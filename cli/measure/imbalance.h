// How evenly a kernel's workers share its work.
#pragma once

#include "verify/execution.h"

namespace wh::cli {

// The largest of the workers' times over their mean, less 1: the least of a few runs, as whatever
// else the machine does can only add to it. 0 for one worker.
Result<double> imbalance(Execution& execution);

}  // namespace wh::cli
