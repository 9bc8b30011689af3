#include "api/profile_store.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <sstream>
#include <string_view>

#include "api/machine.h"
#include "core/names.h"

namespace wh {
namespace {

constexpr uintmax_t kMostBytes = 16 << 20;

Status io_error(const char* action, const std::filesystem::path& path) {
  return {Code::kInternal,
          fmt::format("cannot {} {}: {}", action, path.string(), std::strerror(errno))};
}

// Writes and flushes to the disk: a full one shows here and not after the rename.
Status write_file(const std::filesystem::path& path, const std::string& text) {
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (file < 0) return io_error("create", path);
  size_t written = 0;
  while (written < text.size()) {
    const ssize_t count = write(file, text.data() + written, text.size() - written);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) break;
    written += static_cast<size_t>(count);
  }
  const bool complete = written == text.size() && fsync(file) == 0;
  const Status status = complete ? Status() : io_error("write", path);
  close(file);
  return status;
}

bool load_shipped(const ProfileIdentity& here, LoadedProfile& loaded) {
  const ShippedProfile* one = closest_profile(shipped_profiles(), here);
  if (one == nullptr) return false;
  Result<Profile> shipped = Profile::from_json(one->json);
  if (!shipped.ok()) return false;
  loaded.description = fmt::format("shipped profile for {}, measured on {}", one->isa, one->device);
  loaded.profile = std::move(*shipped);
  loaded.is_valid = true;
  return true;
}

LoadedProfile load(Device device, int32_t device_index) {
  LoadedProfile loaded;
  const ProfileIdentity here = this_identity(device, device_index);
  const std::filesystem::path path = profile_path(device, device_index);
  std::error_code error;
  std::string ignored;
  const bool exists = !path.empty() && std::filesystem::exists(path, error);
  if (error) ignored = fmt::format("; {} cannot be read: {}", path.string(), error.message());
  if (exists) {
    Result<Profile> cached = read_profile(path);
    ignored = cached.ok() ? difference(cached->identity(), here) : cached.status().message();
    if (ignored.empty()) {
      loaded.description =
          fmt::format("profile of this machine, measured {}", cached->measured_on());
      loaded.profile = std::move(*cached);
      loaded.is_valid = true;
      return loaded;
    }
    ignored = fmt::format("; {} is ignored: {}", path.string(), ignored);
  }
  if (!load_shipped(here, loaded)) loaded.description = "formula";
  loaded.description += ignored;
  return loaded;
}

}  // namespace

const ShippedProfile* closest_profile(std::span<const ShippedProfile> shipped,
                                      const ProfileIdentity& here) {
  const ShippedProfile* closest = nullptr;
  ptrdiff_t most = -1;  // characters that the names begin with in common
  for (const ShippedProfile& one : shipped) {
    const std::string_view device = one.device;
    const ptrdiff_t common =
        std::mismatch(device.begin(), device.end(), here.device.begin(), here.device.end()).first -
        device.begin();
    if (here.isa == one.isa && common > most) {
      closest = &one;
      most = common;
    }
  }
  return closest;
}

std::filesystem::path profile_path(Device device, int32_t device_index) {
  std::filesystem::path folder;
  const char* cache = std::getenv("XDG_CACHE_HOME");
  if (cache != nullptr && *cache == '/') {
    folder = cache;
  } else if (const char* home = std::getenv("HOME"); home != nullptr && *home == '/') {
    folder = std::filesystem::path(home) / ".cache";
  } else {
    return {};
  }
  // The host is one device; others have numbers.
  const std::string number = backend(device).is_host() ? "" : std::to_string(device_index);
  const std::string name = kDevices.name(device) + number + ".json";
  return folder / "widehead" / name;
}

ProfileIdentity this_identity(Device device, int32_t device_index) {
  ProfileIdentity identity = backend(device).identity(device_index);
  identity.library_version = WIDEHEAD_VERSION;
  return identity;
}

Result<Profile> read_profile(const std::filesystem::path& path) {
  std::error_code error;
  const uintmax_t bytes = std::filesystem::file_size(path, error);
  if (error) {
    return invalid(fmt::format("cannot read {}: {}", path.string(), error.message()));
  }
  if (bytes > kMostBytes) {
    return invalid(
        fmt::format("{} has {} bytes; a profile has at most {}", path.string(), bytes, kMostBytes));
  }
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  if (!file) return io_error("read", path);
  return Profile::from_json(text.str());
}

Status write_profile(const std::filesystem::path& path, const Profile& profile) {
  std::error_code error;
  std::filesystem::create_directories(path.parent_path(), error);
  if (error) {
    return {Code::kInternal,
            fmt::format("cannot create {}: {}", path.parent_path().string(), error.message())};
  }
  // The process id keeps two writers apart; whichever renames last wins, whole.
  const std::filesystem::path temporary = path.string() + fmt::format(".{}", getpid());
  Status status = write_file(temporary, profile.to_json());
  if (status.ok() && std::rename(temporary.c_str(), path.c_str()) != 0) {
    status = io_error("rename to", path);
  }
  if (!status.ok()) std::filesystem::remove(temporary, error);
  return status;
}

const LoadedProfile& loaded_profile(Device device, int32_t device_index) {
  static std::mutex mutex;
  static std::map<std::pair<Device, int32_t>, LoadedProfile> profiles;
  const std::lock_guard lock(mutex);
  const std::pair key{device, device_index};
  if (const auto found = profiles.find(key); found != profiles.end()) return found->second;
  return profiles.emplace(key, load(device, device_index)).first->second;
}

}  // namespace wh
