// A communicator as the C API takes one.
#pragma once

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "api/guarded.h"
#include "parallel/communicator.h"
#include "widehead/parallel.h"

namespace wh::sharded {

class ExportedCommunicator {
 public:
  explicit ExportedCommunicator(Communicator& communicator) : communicator_(communicator) {}

  // Valid while this is.
  wh_communicator c_struct() {
    wh_communicator c;
    (void)wh_communicator_init(&c, sizeof(c));
    c.context = this;
    c.rank = communicator_.rank();
    c.ranks = communicator_.ranks();
    c.start = [](void* self, int32_t exchange, const wh_transfer* transfers, size_t count) {
      return of(self).answered([&](Communicator& to) {
        std::vector<Communicator::Transfer> all;
        for (size_t i = 0; i < count; ++i) {
          const wh_transfer& t = transfers[i];
          all.push_back({t.peer, t.is_send != 0, t.data, t.bytes});
        }
        return to.start(exchange, all);
      });
    };
    c.finish = [](void* self, int32_t exchange, double timeout_s) {
      return of(self).answered([&](Communicator& to) {
        const std::chrono::duration<double> timeout(timeout_s);
        return to.finish(exchange,
                         Communicator::Clock::now() +
                             std::chrono::duration_cast<Communicator::Clock::duration>(timeout));
      });
    };
    c.poll = [](void* self) { of(self).communicator_.poll(); };
    c.error = [](void* self) { return of(self).error_.c_str(); };
    c.give_up = [](void* self) { of(self).communicator_.give_up(); };
    return c;
  }

 private:
  static ExportedCommunicator& of(void* self) { return *static_cast<ExportedCommunicator*>(self); }
  template <typename Call>
  int32_t answered(const Call& call) {
    try {
      const Status status = call(communicator_);
      if (!status.ok()) error_ = status.message();
      return code_of(status);
    } catch (const std::bad_alloc&) {
      return WH_OUT_OF_MEMORY;
    }
  }

  Communicator& communicator_;
  std::string error_;
};

// One that goes when destroy_exported() is called.
class OwningExport final : public ExportedCommunicator {
 public:
  explicit OwningExport(std::unique_ptr<Communicator> communicator)
      : ExportedCommunicator(*communicator), owned_(std::move(communicator)) {}

 private:
  std::unique_ptr<Communicator> owned_;
};

// Into the caller's struct, of `size` bytes, what make() answers with, once connect() has connected
// it with the other ranks. Where that fails the struct has no functions, but what was made stays
// until destroy_exported(): what is still under way may use its memory, and only the caller can end
// that. For functions of the library widehead_parallel, whose messages are left in the other one's
// wh_last_error().
template <typename Make, typename Connect>
wh_status export_new(wh_communicator* to, size_t size, const Make& make,
                     const Connect& connect) noexcept {
  if (const wh_status status = wh_communicator_init(to, size); status != WH_OK) return status;
  try {
    auto made = make();
    if (!made.ok()) return wh_fail(code_of(made.status()), made.status().message().c_str());
    auto& communicator = **made;
    auto exported = std::make_unique<OwningExport>(std::move(*made));
    wh_communicator c = exported->c_struct();
    to->context = c.context;
    exported.release();  // the context's, until destroy_exported()
    if (const Status status = connect(communicator); !status.ok()) {
      return wh_fail(code_of(status), status.message().c_str());
    }
    c.size = to->size;
    std::memcpy(to, &c, std::min(size, sizeof(c)));
    return WH_OK;
  } catch (const std::bad_alloc&) {
    return wh_fail(WH_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return wh_fail(WH_INTERNAL_ERROR, error.what());
  }
}
inline void destroy_exported(wh_communicator* communicator) {
  if (communicator == nullptr) return;
  delete static_cast<OwningExport*>(static_cast<ExportedCommunicator*>(communicator->context));
  communicator->context = nullptr;
}

}  // namespace wh::sharded
