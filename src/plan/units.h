// Bytes and times as people read them, in plans and messages.
#pragma once

#include <cstdint>
#include <string>

namespace wh {

std::string format_bytes(uint64_t bytes);  // "1.5 MiB"
std::string format_us(double us);          // "12.3 us", "4.56 ms", "1.2 s"

}  // namespace wh
