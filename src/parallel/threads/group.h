// Ranks that are threads of one process, on the host or on one device: messages are copies. It
// stands in for what connects several devices.
#pragma once

#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "parallel/communicator.h"
#include "plan/backend.h"

namespace wh::sharded {

class ThreadGroup {
 public:
  explicit ThreadGroup(int32_t ranks, Device device = Device::kCpu, int32_t device_index = 0)
      : ranks_(ranks), device_(device), on_{device_index, nullptr} {}

  class Member final : public Communicator {
   public:
    Member(ThreadGroup& group, int32_t rank) : group_(group), rank_(rank) {}
    int32_t rank() const override { return rank_; }
    int32_t ranks() const override { return group_.ranks_; }
    Status start(int32_t exchange, std::span<const Transfer> transfers) override;
    Status finish(int32_t exchange, Clock::time_point deadline) override;
    Status settle(Clock::time_point) override { return group_.device().synchronize(group_.on_); }
    void give_up() override;

   private:
    friend class ThreadGroup;
    // From one rank to another.
    struct Channel {
      std::deque<Transfer> sends, receives;
      size_t done = 0;
    };
    struct Pending {
      Channel* channel;
      size_t index;
      Transfer transfer;
    };
    ThreadGroup& group_;
    int32_t rank_;
    std::map<int32_t, std::vector<Pending>> pending_;
  };

 private:
  const Backend& device() const { return backend(device_); }
  // What both sides have started.
  Status carry_out(Member::Channel& channel, int32_t exchange) const;

  int32_t ranks_;
  Device device_;
  DeviceStream on_;
  std::mutex mutex_;
  std::condition_variable arrived_;
  Status failure_;  // once a rank gave up, whose memory may be gone; every rank hears of it
  std::map<std::pair<int32_t, int32_t>, Member::Channel> channels_;
};

}  // namespace wh::sharded
