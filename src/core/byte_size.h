// Byte counts as people write them.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace wh {

// "512MiB", "1.5 GiB", "8GB", "4096": bytes, or nothing when it is no such text or above 2^63.
std::optional<uint64_t> parse_bytes(std::string_view text);

}  // namespace wh
