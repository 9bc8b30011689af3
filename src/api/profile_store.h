// The profile that `widehead tune` leaves in the user's cache folder, and those that the library
// ships.
#pragma once

#include <filesystem>
#include <span>
#include <string>

#include "api/shipped_profiles.h"
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

// Of those for this instruction set the one whose device's name begins most like this one's: cards
// of one make share a beginning ("NVIDIA H200 NVL"), and with it memory and clocks, by which cards
// of one instruction set differ. Of equals the first. Null: none is for this instruction set.
const ShippedProfile* closest_profile(std::span<const ShippedProfile> shipped,
                                      const ProfileIdentity& here);

// The cached profile, else the closest that ships, else none. Read once a process.
const LoadedProfile& loaded_profile(Device device, int32_t device_index);

}  // namespace wh
