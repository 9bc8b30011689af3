#include "parallel/link.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#include "api/workspace.h"

namespace wh::sharded {
namespace {

using Clock = Communicator::Clock;

constexpr int64_t kLargeBytes = 32 << 20, kSmallBytes = 64;

class LinkMeter {
 public:
  LinkMeter(Communicator& communicator, std::byte* out, std::byte* in,
            std::chrono::milliseconds timeout)
      : communicator_(communicator), out_(out), in_(in), timeout_(timeout) {}

  // Of one message among `count` in a row; the slowest rank's, the best of a few times.
  Result<double> us(int64_t bytes, int count) {
    double best = INFINITY;
    for (int i = 0; i < 5; ++i) {
      // Nobody begins before everybody is there.
      const std::array<uint64_t, 1> nothing{};
      const auto here = tell_all(communicator_, nothing, deadline());
      if (!here.ok()) return here.status();
      const auto begin = Clock::now();
      for (int j = 0; j < count; ++j) WH_RETURN_IF_ERROR(exchange(bytes));
      WH_RETURN_IF_ERROR(communicator_.settle(deadline()));
      const std::chrono::duration<double, std::micro> took = Clock::now() - begin;
      const std::array<uint64_t, 1> mine{std::bit_cast<uint64_t>(took.count() / count)};
      const auto all = tell_all(communicator_, mine, deadline());
      if (!all.ok()) return all.status();
      double slowest = 0;
      for (const uint64_t one : *all) slowest = std::max(slowest, std::bit_cast<double>(one));
      best = std::min(best, slowest);
    }
    return best;
  }

 private:
  Clock::time_point deadline() const { return Clock::now() + timeout_; }
  Status exchange(int64_t bytes) {
    const int32_t ranks = communicator_.ranks(), rank = communicator_.rank();
    const Communicator::Transfer both[] = {{(rank + 1) % ranks, true, out_, bytes},
                                           {(rank + ranks - 1) % ranks, false, in_, bytes}};
    WH_RETURN_IF_ERROR(communicator_.start(0, both));
    return communicator_.finish(0, deadline());
  }

  Communicator& communicator_;
  std::byte *out_, *in_;
  std::chrono::milliseconds timeout_;
};

}  // namespace

Result<Link> measure_link(Communicator& communicator, DeviceMemory memory,
                          std::chrono::milliseconds timeout) {
  Link link{1, 0, memory.gbytes_per_s};
  if (communicator.ranks() == 1) return link;
  const auto there =
      Workspace::allocate({memory.device, {memory.device_index, nullptr}}, 2 * kLargeBytes);
  if (!there.ok()) return there.status();
  auto* at = static_cast<std::byte*>(there->data());
  if (backend(memory.device).is_host()) std::fill(at, at + 2 * kLargeBytes, std::byte{1});
  LinkMeter meter(communicator, at, at + kLargeBytes, timeout);
  const auto small = meter.us(kSmallBytes, 20);
  if (!small.ok()) return small.status();
  const auto large = meter.us(kLargeBytes, 3);
  if (!large.ok()) return large.status();
  link.latency_us = *small;
  link.gbytes_per_s = kLargeBytes / std::max(1.0, *large - *small) * 1e-3;
  return link;
}

}  // namespace wh::sharded
