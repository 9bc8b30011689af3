#include "core/byte_size.h"

#include <cctype>
#include <cmath>
#include <string>

namespace wh {
namespace {

struct Unit {
  const char* name;
  double bytes;
};
constexpr Unit kUnits[] = {{"", 1},         {"b", 1},        {"k", 0x1p10},   {"m", 0x1p20},
                           {"g", 0x1p30},   {"t", 0x1p40},   {"kib", 0x1p10}, {"mib", 0x1p20},
                           {"gib", 0x1p30}, {"tib", 0x1p40}, {"kb", 1e3},     {"mb", 1e6},
                           {"gb", 1e9},     {"tb", 1e12}};

}  // namespace

std::optional<uint64_t> parse_bytes(std::string_view text) {
  size_t digits = 0;
  while (digits < text.size() &&
         (std::isdigit(static_cast<unsigned char>(text[digits])) || text[digits] == '.')) {
    ++digits;
  }
  if (digits == 0 || digits > 24) return std::nullopt;
  const std::string number(text.substr(0, digits));
  char* end = nullptr;
  const double value = std::strtod(number.c_str(), &end);
  if (*end != '\0') return std::nullopt;
  std::string unit;
  for (const char c : text.substr(digits)) {
    if (c != ' ') unit += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  }
  for (const Unit& known : kUnits) {
    if (unit != known.name) continue;
    const double bytes = std::round(value * known.bytes);
    if (bytes >= 0x1p63) return std::nullopt;
    return static_cast<uint64_t>(bytes);
  }
  return std::nullopt;
}

}  // namespace wh
