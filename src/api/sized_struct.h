// Structs of the C ABI that carry their own size, so that fields can be added to their end.
//
// A caller may have been compiled against another version. The fields that both know are copied,
// those that only this library knows keep their defaults, and those that only the caller knows must
// be zero, as init_sized() leaves them.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "core/status.h"

namespace wh {

constexpr size_t kMostStructBytes = 65536;

// What each struct is to this library: its name without "wh_", the least size that it ever had, and
// what a field is that the caller does not know.
template <typename Struct>
struct SizedStruct {
  const char* name;
  size_t first_bytes;  // sizeof in the first release; padding at its end is never used by a field
  Struct defaults;
};

inline Status check_struct_bytes(const char* what, const char* name, size_t bytes,
                                 size_t first_bytes) {
  if (bytes >= first_bytes && bytes <= kMostStructBytes) return {};
  return invalid(fmt::format("{} is {}; wh_{}_init() sets it to sizeof(wh_{}), {} to {}", what,
                             bytes, name, name, first_bytes, kMostStructBytes));
}

template <typename Struct>
Status read_sized(const SizedStruct<Struct>& sized, const Struct* from, Struct& to) {
  if (from == nullptr) return invalid(fmt::format("{} is null", sized.name));
  const size_t bytes = from->size;
  if (Status status = check_struct_bytes(fmt::format("{}.size", sized.name).c_str(), sized.name,
                                         bytes, sized.first_bytes);
      !status.ok()) {
    return status;
  }
  const auto* raw = reinterpret_cast<const unsigned char*>(from);
  for (size_t i = sizeof(Struct); i < bytes; ++i) {
    if (raw[i] == 0) continue;
    return invalid(
        fmt::format("byte {} of {} is {}; it belongs to a field that this version of the library "
                    "does not have and must be 0",
                    i, sized.name, raw[i]));
  }
  to = sized.defaults;
  std::memcpy(static_cast<void*>(&to), raw, std::min(bytes, sizeof(Struct)));
  return {};
}

// `bytes` is what the caller's sizeof says: no more is written.
template <typename Struct>
Status init_sized(const SizedStruct<Struct>& sized, Struct* target, size_t bytes) {
  if (target == nullptr) return invalid(fmt::format("{} is null", sized.name));
  if (Status status = check_struct_bytes("size", sized.name, bytes, sized.first_bytes);
      !status.ok()) {
    return status;
  }
  Struct defaults = sized.defaults;
  defaults.size = bytes;
  std::memset(static_cast<void*>(target), 0, bytes);
  std::memcpy(static_cast<void*>(target), &defaults, std::min(bytes, sizeof(Struct)));
  return {};
}

// What the caller's struct has room for. Its size stays.
template <typename Struct>
Status write_sized(const SizedStruct<Struct>& sized, Struct value, Struct* to) {
  if (to == nullptr) return invalid(fmt::format("{} is null", sized.name));
  value.size = to->size;
  return init_sized(SizedStruct<Struct>{sized.name, sized.first_bytes, value}, to, to->size);
}

}  // namespace wh
