#include "parallel/simulation.h"

#include <algorithm>
#include <deque>
#include <limits>
#include <map>
#include <utility>

namespace wh::sharded {
namespace {

// A message that one side, or both, has started.
struct Flight {
  double send_us = -1, receive_us = -1;  // when each side did; -1: not yet
  double end_us = -1;
  int64_t bytes = 0;
};

class Clockwork {
 public:
  Clockwork(const std::vector<const Schedule*>& schedules, const Link& link,
            const std::function<double(int32_t, const Attend&)>& attend_us)
      : schedules_(schedules), link_(link), attend_us_(attend_us), ranks_(schedules.size()) {}

  Simulation run() {
    // Whoever is behind goes first, so that links are taken in about the order of time.
    for (;;) {
      int32_t next = -1;
      bool is_done = true;
      for (int32_t r = 0; r < static_cast<int32_t>(ranks_.size()); ++r) {
        const Rank& rank = at(r);
        if (rank.step == schedules_[static_cast<size_t>(r)]->steps.size()) continue;
        is_done = false;
        if (!is_blocked(r) && (next < 0 || rank.now_us < at(next).now_us)) next = r;
      }
      if (is_done) break;
      if (next < 0) {
        result_.us = std::numeric_limits<double>::infinity();
        return std::move(result_);
      }
      advance(next);
    }
    for (const Rank& rank : ranks_) {
      result_.us = std::max(result_.us, rank.now_us);
      result_.work_us = std::max(result_.work_us, rank.work_us);
    }
    return std::move(result_);
  }

 private:
  struct Rank {
    size_t step = 0;
    double now_us = 0, work_us = 0;
    double out_free_us = 0, in_free_us = 0;             // of its link, each way
    std::map<int32_t, std::vector<Flight*>> exchanges;  // what it has started
  };
  // Between two ranks, in one direction, in order.
  struct Channel {
    std::deque<Flight> flights;
    size_t sent = 0, received = 0;
  };

  Rank& at(int32_t rank) { return ranks_[static_cast<size_t>(rank)]; }

  bool is_blocked(int32_t r) {
    Rank& rank = at(r);
    const auto* finish = std::get_if<Finish>(&schedules_[static_cast<size_t>(r)]->steps[rank.step]);
    if (finish == nullptr) return false;
    const auto& flights = rank.exchanges[finish->exchange];
    return std::any_of(flights.begin(), flights.end(),
                       [](const Flight* flight) { return flight->end_us < 0; });
  }

  void work(int32_t r, double us, const char* label) {
    Rank& rank = at(r);
    result_.activities.push_back({r, false, rank.now_us, rank.now_us + us, label});
    rank.now_us += us;
    rank.work_us += us;
  }
  double memory_us(int64_t bytes) const {
    return static_cast<double>(bytes) / (link_.memory_gbytes_per_s * 1e3);
  }

  void post(int32_t r, const Start& start) {
    Rank& rank = at(r);
    for (const Message& message : start.messages) {
      const int32_t from = message.is_send ? r : message.peer;
      const int32_t to = message.is_send ? message.peer : r;
      Channel& channel = channels_[{from, to}];
      size_t& next = message.is_send ? channel.sent : channel.received;
      if (next == channel.flights.size()) channel.flights.emplace_back();
      Flight& flight = channel.flights[next++];
      (message.is_send ? flight.send_us : flight.receive_us) = rank.now_us;
      flight.bytes = message.bytes;
      rank.exchanges[start.exchange].push_back(&flight);
      if (flight.send_us < 0 || flight.receive_us < 0) continue;
      const double begin_us =
          std::max({flight.send_us, flight.receive_us, at(from).out_free_us, at(to).in_free_us});
      const double gone_us =
          begin_us + static_cast<double>(flight.bytes) / (link_.gbytes_per_s * 1e3);
      flight.end_us = gone_us + link_.latency_us;
      at(from).out_free_us = at(to).in_free_us = gone_us;
      result_.activities.push_back(
          {to, true, begin_us, flight.end_us, "from rank " + std::to_string(from)});
    }
  }

  void advance(int32_t r) {
    Rank& rank = at(r);
    const Step& step = schedules_[static_cast<size_t>(r)]->steps[rank.step++];
    if (const auto* copy = std::get_if<Copy>(&step)) {
      work(r, memory_us(2 * copy->bytes()), "copy");
    } else if (const auto* attend = std::get_if<Attend>(&step)) {
      work(r, attend_us_(r, *attend), "attend");
    } else if (const auto* merge = std::get_if<Merge>(&step)) {
      const auto& e = merge->extents;
      const auto tensors = static_cast<int64_t>(merge->parts.size()) + 1;
      work(r, memory_us(tensors * e[0] * e[1] * e[2] * e[3] * 4), "merge");
    } else if (const auto* write = std::get_if<Write>(&step)) {
      work(r, memory_us(static_cast<int64_t>(write->numbers.size()) * 4), "write");
    } else if (const auto* start = std::get_if<Start>(&step)) {
      post(r, *start);
    } else if (const auto* finish = std::get_if<Finish>(&step)) {
      for (const Flight* flight : rank.exchanges[finish->exchange]) {
        rank.now_us = std::max(rank.now_us, flight->end_us);
      }
    }
  }

  const std::vector<const Schedule*>& schedules_;
  const Link& link_;
  const std::function<double(int32_t, const Attend&)>& attend_us_;
  std::vector<Rank> ranks_;
  std::map<std::pair<int32_t, int32_t>, Channel> channels_;
  Simulation result_;
};

}  // namespace

Simulation simulate(const std::vector<const Schedule*>& schedules, const Link& link,
                    const std::function<double(int32_t, const Attend&)>& attend_us) {
  return Clockwork(schedules, link, attend_us).run();
}

}  // namespace wh::sharded
