// Flags that hold a number.
#pragma once

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>

namespace wh::cli {

template <typename Number>
struct Range {
  Number least, most;
};

// Read here, as CLI11 makes the largest number of -1 where it is unsigned and of what is too large,
// takes NaN, and says of what it does not take no more than that. The value may be optional.
template <typename Number, typename Value>
CLI::Option* add_number_flag(CLI::App& app, const std::string& name, Value& value,
                             Range<Number> valid, const std::string& help) {
  static_assert(std::is_same_v<Value, Number> || std::is_same_v<Value, std::optional<Number>>);
  constexpr bool kIsWhole = std::is_integral_v<Number>;
  const auto read = [name, valid, &value](const std::string& text) {
    Number number{};
    const char* const last = text.data() + text.size();
    const auto [end, error] = std::from_chars(text.data(), last, number);
    if (error != std::errc() || end != last || !(number >= valid.least && number <= valid.most)) {
      throw CLI::ValidationError(fmt::format("{} is \"{}\"; it must be {} from {} to {}", name,
                                             text, kIsWhole ? "an integer" : "a number",
                                             valid.least, valid.most));
    }
    value = number;
  };
  return app.add_option_function<std::string>(name, read, help)
      ->type_name(kIsWhole ? "INT" : "FLOAT");
}

// Of samples, runs and the like.
constexpr Range<int64_t> kCounts{1, 1'000'000};
constexpr Range<int64_t> kBytes{0, int64_t{1} << 40};
constexpr Range<double> kSeconds{0, 1e9};
constexpr Range<uint64_t> kSeeds{0, std::numeric_limits<uint64_t>::max()};

}  // namespace wh::cli
