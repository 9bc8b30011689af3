// Parses JSON, and reads members of an object with the name of the one that is missing or wrong.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <type_traits>
#include <utility>

#include "core/names.h"

namespace wh {

// A parsed text. nlohmann::json's destructor flattens what is nested, for which it allocates, and
// ends the program where that fails: here the innermost go first, and nothing is left to flatten.
class JsonDocument {
 public:
  explicit JsonDocument(const std::string& text)
      : root_(nlohmann::json::parse(text, keep_shallow, /*allow_exceptions=*/false)) {}
  ~JsonDocument() { empty(root_); }
  JsonDocument(const JsonDocument&) = delete;
  JsonDocument& operator=(const JsonDocument&) = delete;

  bool is_valid() const { return !root_.is_discarded(); }
  const nlohmann::json& root() const { return root_; }

 private:
  // What the library reads is less deep; deeper values are dropped, as empty() calls itself.
  static constexpr int kMostDepth = 16;

  static bool keep_shallow(int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
    return depth < kMostDepth;
  }
  static void empty(nlohmann::json& json) {
    if (!json.is_structured()) return;
    for (nlohmann::json& child : json) empty(child);
    json.clear();
  }

  nlohmann::json root_;
};

struct MalformedJson {
  std::string message;
};

// What is missing or of another type throws MalformedJson, which each parser catches.
class JsonReader {
 public:
  JsonReader(const nlohmann::json& object, std::string path)
      : object_(object), path_(std::move(path)) {
    if (!object.is_object()) throw MalformedJson{path_ + " is not an object"};
  }

  const nlohmann::json& member(const char* name) const {
    const auto found = object_.find(name);
    if (found == object_.end()) throw MalformedJson{path_ + "." + name + " is missing"};
    return *found;
  }
  template <typename T>
  void read(const char* name, T& value) const {
    value = convert<T>(member(name), path_ + "." + name);
  }
  template <typename Enum, size_t kCount>
  void read(const char* name, const Names<Enum, kCount>& table, Enum& value) const {
    const auto text = convert<std::string>(member(name), path_ + "." + name);
    const auto found = table.value(text);
    if (!found) {
      throw MalformedJson{
          fmt::format("{}.{} is \"{}\"; valid: {}", path_, name, text, table.list())};
    }
    value = *found;
  }

 private:
  template <typename T>
  static T convert(const nlohmann::json& json, const std::string& path) {
    if constexpr (std::is_same_v<T, bool>) {
      if (!json.is_boolean()) throw MalformedJson{path + " is not true or false"};
      return json.get<bool>();
    } else if constexpr (std::is_same_v<T, std::string>) {
      if (!json.is_string()) throw MalformedJson{path + " is not a string"};
      return json.get<std::string>();
    } else if constexpr (std::is_same_v<T, Strides>) {
      if (!json.is_array() || json.size() != 4) throw MalformedJson{path + " is not four integers"};
      Strides strides;
      for (size_t i = 0; i < 4; ++i) strides[i] = convert<int64_t>(json[i], path);
      return strides;
    } else if constexpr (std::is_floating_point_v<T>) {
      if (!json.is_number()) throw MalformedJson{path + " is not a number"};
      return json.get<T>();
    } else {
      if (!json.is_number_integer()) throw MalformedJson{path + " is not an integer"};
      const bool fits = json.is_number_unsigned() ? std::in_range<T>(json.get<uint64_t>())
                                                  : std::in_range<T>(json.get<int64_t>());
      if (!fits) throw MalformedJson{path + " is out of range"};
      return json.get<T>();
    }
  }

  const nlohmann::json& object_;
  std::string path_;
};

}  // namespace wh
