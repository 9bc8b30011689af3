// A communicator as the C API takes one.
#pragma once

#include <string>
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

}  // namespace wh::sharded
