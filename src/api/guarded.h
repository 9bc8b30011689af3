// How functions of the C API answer: a status, its message for wh_last_error(), and no exception.
#pragma once

#include <exception>
#include <new>
#include <string>
#include <utility>

#include "core/status.h"
#include "widehead/widehead.h"

namespace wh {

inline wh_status code_of(const Status& status) {
  switch (status.code()) {
    case Code::kOk:
      return WH_OK;
    case Code::kInvalidArgument:
      return WH_INVALID_ARGUMENT;
    case Code::kRefused:
      return WH_REFUSED;
    case Code::kOutOfMemory:
      return WH_OUT_OF_MEMORY;
    case Code::kDeviceError:
      return WH_DEVICE_ERROR;
    case Code::kCancelled:
      return WH_CANCELLED;
    case Code::kInternal:
      break;
  }
  return WH_INTERNAL_ERROR;
}
// Keeps the message for wh_last_error(). Of text that is there for good it takes no memory.
wh_status fail(wh_status status, std::string message) noexcept;
wh_status fail_with_text(wh_status status, const char* text) noexcept;
wh_status fail_with(const std::exception& error) noexcept;

// Needs no memory: a refusal must not turn into another failure after its plan has been handed out.
inline wh_status answer(Status status) {
  return status.ok() ? WH_OK : fail(code_of(status), std::move(status).message());
}

// Runs body, which answers with a Status; nothing leaves it as an exception.
template <typename Body>
wh_status guarded(Body&& body) noexcept {
  try {
    return answer(body());
  } catch (const std::bad_alloc&) {
    return fail_with_text(WH_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return fail_with(error);
  } catch (...) {
    return fail_with_text(WH_INTERNAL_ERROR, "internal error: an exception of an unknown type");
  }
}

}  // namespace wh
