// The profiles in data/profiles, as the build embedded them.
#pragma once

#include <span>

namespace wh {

struct ShippedProfile {
  const char* isa;
  const char* device;  // the model that it was measured on
  const char* json;    // parsing all of them for the one that fits would take milliseconds
};
std::span<const ShippedProfile> shipped_profiles();

}  // namespace wh
