// The profile that `widehead tune` leaves in the user's cache folder, and those that the library
// ships.
#pragma once

#include <filesystem>
#include <string>

#include "plan/profile.h"

namespace wh {

// $XDG_CACHE_HOME/widehead/cpu.json, or under $HOME/.cache; empty when neither is set.
std::filesystem::path profile_path(Device device, int32_t device_index);

// What a profile must have been measured on to hold here.
ProfileIdentity this_identity(Device device, int32_t device_index);

Result<Profile> read_profile(const std::filesystem::path& path);

// Complete or not at all: a full disk or a crash leaves the old profile intact.
Status write_profile(const std::filesystem::path& path, const Profile& profile);

struct LoadedProfile {
  Profile profile;
  bool is_valid = false;
  std::string description;  // for the plan: which one, or why the cached one is ignored
};

// The cached profile, else a shipped one for this instruction set, else none. Read once a process.
const LoadedProfile& loaded_profile(Device device, int32_t device_index);

}  // namespace wh
