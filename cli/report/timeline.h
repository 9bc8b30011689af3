// What ranks do when, as SVG: a row for each rank's work and one for its messages.
#pragma once

#include <string>

#include "parallel/plan.h"

namespace wh::cli {

std::string timeline_svg(const std::string& title, const sharded::Simulation& simulation,
                         int32_t ranks);

}  // namespace wh::cli
