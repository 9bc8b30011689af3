// The profiles in data/profiles, as the build embedded them.
#pragma once

#include <span>

namespace wh {

std::span<const char* const> shipped_profiles();

}  // namespace wh
