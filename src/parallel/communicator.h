// Messages between ranks, over whatever connects them. The caller owns the connection.
#pragma once

#include <chrono>
#include <cstdint>
#include <span>
#include <vector>

#include "core/status.h"

namespace wh::sharded {

class Communicator {
 public:
  using Clock = std::chrono::steady_clock;

  struct Transfer {
    int32_t peer;
    bool is_send;
    void* data;
    int64_t bytes;
  };

  virtual ~Communicator() = default;
  virtual int32_t rank() const = 0;
  virtual int32_t ranks() const = 0;

  // Sends and receives at once, without waiting. Transfers between two ranks meet in the order in
  // which both start them. On a device with streams they follow what the stream holds by now, and
  // memory is the device's; under a negative number it is the host's.
  virtual Status start(int32_t exchange, std::span<const Transfer> transfers) = 0;
  // Waits for what start() began under this number, on a device by its stream. After a failure, of
  // which the status names the rank, the connection is of no more use.
  virtual Status finish(int32_t exchange, Clock::time_point deadline) = 0;
  // Waits for all that the rank's device still does: run_rank() leaves the rest of it on a stream.
  virtual Status settle(Clock::time_point) { return {}; }
  // Called now and then while the rank computes, from any thread but never from two at once: for
  // connections that move only when they are asked to.
  virtual void poll() {}
  // This rank failed and its memory may go: what it has in flight ends, as far as that is in the
  // connection's power, which is of no more use then. More than once is no error.
  virtual void give_up() {}
};

// What ranks answer with that are told so.
Status gave_up(int32_t rank);

// That a transfer of this rank's was not done in time: by whom, and what.
Status late(const Communicator::Transfer& transfer, int32_t rank);

// A few numbers of each rank, at least one, for every rank, in the order of the ranks. Nobody has
// them before everybody came.
Result<std::vector<uint64_t>> tell_all(Communicator& communicator, std::span<const uint64_t> mine,
                                       Communicator::Clock::time_point deadline);

}  // namespace wh::sharded
