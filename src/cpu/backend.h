// The processor that the program runs on.
#pragma once

#include "plan/backend.h"

namespace wh::cpu {

const Backend& backend();

}  // namespace wh::cpu
