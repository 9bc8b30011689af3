// Writes a JSON document a value at a time.
//
// Not as a tree of nlohmann::json: its destructor allocates, and ends the program where that fails,
// and its lists leak where an element cannot be made. Single strings and numbers are safe.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <type_traits>
#include <utility>

namespace wh {

class JsonWriter {
 public:
  enum class Layout { kLine, kIndented };
  explicit JsonWriter(Layout layout) : is_indented_(layout == Layout::kIndented) {}

  // The value of `name` in an object; null within an array and for the whole document.
  void begin_object(const char* name = nullptr) { begin(name, '{'); }
  void begin_array(const char* name = nullptr) { begin(name, '['); }
  void end_object() { end('}'); }
  void end_array() { end(']'); }

  template <typename T>
  void write(const char* name, const T& value) {
    begin_value(name);
    // Bytes that are no UTF-8 are replaced; a number that is not finite becomes null.
    const nlohmann::json json(value);
    static_assert(std::is_arithmetic_v<T> || std::is_convertible_v<T, std::string> ||
                  std::is_null_pointer_v<T>);
    text_ += json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  }
  template <typename Range>
  void write_array(const char* name, const Range& values) {
    begin_array(name);
    for (const auto& value : values) write(nullptr, value);
    end_array();
  }

  std::string take() { return std::move(text_); }

 private:
  void begin_value(const char* name) {
    if (!is_first_) text_ += ',';
    is_first_ = false;
    if (depth_ > 0) new_line();
    if (name == nullptr) return;
    text_ += '"';
    text_ += name;
    text_ += is_indented_ ? "\": " : "\":";
  }
  void begin(const char* name, char bracket) {
    begin_value(name);
    text_ += bracket;
    ++depth_;
    is_first_ = true;
  }
  void end(char bracket) {
    --depth_;
    if (!is_first_) new_line();
    text_ += bracket;
    is_first_ = false;
  }
  void new_line() {
    if (is_indented_) text_.append(1, '\n').append(depth_ * 2, ' ');
  }

  const bool is_indented_;
  std::string text_;
  size_t depth_ = 0;
  bool is_first_ = true;
};

}  // namespace wh
