#include "parallel/threads/group.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

namespace wh::sharded {

Status ThreadGroup::carry_out(Member::Channel& channel, int32_t exchange) const {
  while (channel.done < std::min(channel.sends.size(), channel.receives.size())) {
    const auto& from = channel.sends[channel.done];
    const auto& to = channel.receives[channel.done];
    if (from.bytes != to.bytes) {
      return {Code::kInternal, fmt::format("{} bytes sent, {} expected", from.bytes, to.bytes)};
    }
    const auto bytes = static_cast<size_t>(from.bytes);
    if (bytes > 0 && (exchange < 0 || device().is_host())) {
      std::memcpy(to.data, from.data, bytes);
    } else if (bytes > 0) {
      WH_RETURN_IF_ERROR(device().copy(on_, to.data, from.data, bytes));
      WH_RETURN_IF_ERROR(device().synchronize(on_));
    }
    ++channel.done;
  }
  return {};
}

Status ThreadGroup::Member::start(int32_t exchange, std::span<const Transfer> transfers) {
  // What is sent must be there.
  if (!group_.device().is_host()) WH_RETURN_IF_ERROR(group_.device().synchronize(group_.on_));
  const std::lock_guard lock(group_.mutex_);
  WH_RETURN_IF_ERROR(group_.failure_);
  for (const Transfer& t : transfers) {
    auto& channel =
        group_.channels_[t.is_send ? std::pair{rank_, t.peer} : std::pair{t.peer, rank_}];
    auto& mine = t.is_send ? channel.sends : channel.receives;
    mine.push_back(t);
    pending_[exchange].push_back({&channel, mine.size() - 1, t});
    WH_RETURN_IF_ERROR(group_.carry_out(channel, exchange));
  }
  group_.arrived_.notify_all();
  return {};
}

Status ThreadGroup::Member::finish(int32_t exchange, Clock::time_point deadline) {
  std::unique_lock lock(group_.mutex_);
  for (const Pending& each : pending_[exchange]) {
    const auto is_done = [&] { return each.channel->done > each.index; };
    group_.arrived_.wait_until(lock, deadline, [&] { return is_done() || !group_.failure_.ok(); });
    if (is_done()) continue;
    if (group_.failure_.ok()) group_.failure_ = late(each.transfer, rank_);
    group_.arrived_.notify_all();
    return group_.failure_;
  }
  pending_.erase(exchange);
  return {};
}

// Nothing is copied from or to its memory from then on.
void ThreadGroup::Member::give_up() {
  const std::lock_guard lock(group_.mutex_);
  if (group_.failure_.ok()) group_.failure_ = gave_up(rank_);
  group_.arrived_.notify_all();
}

}  // namespace wh::sharded
