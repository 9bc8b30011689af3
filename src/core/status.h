// Errors as values: a code and a message that names the argument, its value and what is valid.
#pragma once

#include <optional>
#include <string>
#include <utility>

namespace wh {

enum class Code {
  kOk,
  kInvalidArgument,
  kRefused,
  kOutOfMemory,
  kDeviceError,
  kCancelled,
  kInternal
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == Code::kOk; }
  Code code() const { return code_; }
  const std::string& message() const& { return message_; }
  std::string message() && { return std::move(message_); }

 private:
  Code code_ = Code::kOk;
  std::string message_;
};

inline Status invalid(std::string message) { return {Code::kInvalidArgument, std::move(message)}; }

// Either a value or the status that says why there is none.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}
  Result(Status status) : status_(std::move(status)) {}

  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }
  T& operator*() { return *value_; }
  const T& operator*() const { return *value_; }
  T* operator->() { return &*value_; }
  const T* operator->() const { return &*value_; }

 private:
  Status status_;
  std::optional<T> value_;
};

}  // namespace wh

#define WH_RETURN_IF_ERROR(expression) \
  if (::wh::Status status = (expression); !status.ok()) return status
