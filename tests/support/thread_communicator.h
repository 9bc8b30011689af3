// Ranks that are threads of one process: messages are copies. Of a device's memory too, on which it
// stands in for what connects several devices.
#pragma once

#include <fmt/format.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "parallel/communicator.h"

namespace wh::sharded {

class ThreadGroup {
 public:
  // copy(to, from, bytes) must have ended when it returns.
  using CopyBytes = std::function<Status(void*, const void*, size_t)>;
  explicit ThreadGroup(
      int32_t ranks,
      CopyBytes copy = [](void* to, const void* from, size_t bytes) -> Status {
        std::memcpy(to, from, bytes);
        return {};
      })
      : ranks_(ranks), copy_(std::move(copy)) {}

  class Member final : public Communicator {
   public:
    // `wait` ends when what the rank computed so far is there.
    Member(
        ThreadGroup& group, int32_t rank, std::function<Status()> wait = [] { return Status(); })
        : group_(group), rank_(rank), wait_(std::move(wait)) {}
    int32_t rank() const override { return rank_; }
    int32_t ranks() const override { return group_.ranks_; }
    Status start(int32_t exchange, std::span<const Transfer> transfers) override {
      WH_RETURN_IF_ERROR(wait_());
      const std::lock_guard lock(group_.mutex_);
      for (const Transfer& t : transfers) {
        auto& channel =
            group_.channels_[t.is_send ? std::pair{rank_, t.peer} : std::pair{t.peer, rank_}];
        auto& mine = t.is_send ? channel.sends : channel.receives;
        mine.push_back(t);
        pending_[exchange].push_back({&channel, t.is_send, mine.size() - 1, t.peer});
        while (channel.done < std::min(channel.sends.size(), channel.receives.size())) {
          const Transfer& from = channel.sends[channel.done];
          const Transfer& to = channel.receives[channel.done];
          if (from.bytes != to.bytes) {
            return {Code::kInternal,
                    fmt::format("{} bytes sent, {} expected", from.bytes, to.bytes)};
          }
          if (from.bytes > 0 && exchange < 0) {
            std::memcpy(to.data, from.data, static_cast<size_t>(from.bytes));
          } else if (from.bytes > 0) {
            WH_RETURN_IF_ERROR(group_.copy_(to.data, from.data, static_cast<size_t>(from.bytes)));
          }
          ++channel.done;
        }
      }
      group_.arrived_.notify_all();
      return {};
    }
    Status finish(int32_t exchange, Clock::time_point deadline) override {
      std::unique_lock lock(group_.mutex_);
      for (const Pending& each : pending_[exchange]) {
        const bool is_done = group_.arrived_.wait_until(
            lock, deadline, [&] { return each.channel->done > each.index; });
        if (!is_done) {
          return {Code::kDeviceError, fmt::format("rank {} did not {} in time", each.peer,
                                                  each.is_send ? "receive" : "send")};
        }
      }
      pending_.erase(exchange);
      return {};
    }

   private:
    friend class ThreadGroup;
    struct Channel {
      std::deque<Transfer> sends, receives;
      size_t done = 0;
    };
    struct Pending {
      Channel* channel;
      bool is_send;
      size_t index;
      int32_t peer;
    };
    ThreadGroup& group_;
    int32_t rank_;
    std::function<Status()> wait_;
    std::map<int32_t, std::vector<Pending>> pending_;
  };

 private:
  int32_t ranks_;
  CopyBytes copy_;
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::map<std::pair<int32_t, int32_t>, Member::Channel> channels_;
};

}  // namespace wh::sharded
