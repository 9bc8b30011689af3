// How long the ranks' schedules take together: work and messages on a clock.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "parallel/schedule.h"

namespace wh::sharded {

// What connects the ranks: each sends and receives at once, at this rate each way, to whichever
// peer.
struct Link {
  double gbytes_per_s = 0;
  double latency_us = 5;           // of a message, beside others: it does not keep the link
  double memory_gbytes_per_s = 0;  // of a rank's own memory, for copies and merges
};

struct Activity {
  int32_t rank;
  bool is_message;  // on the link, not on the rank's processor
  double begin_us, end_us;
  std::string label;
};

struct Simulation {
  double us = 0;       // when the last rank is done
  double work_us = 0;  // of the rank that works most, without waiting
  std::vector<Activity> activities;
};

// attend_us: of an attention on a rank. Schedules that wait for a message that nobody sends end the
// simulation with infinity.
Simulation simulate(const std::vector<const Schedule*>& schedules, const Link& link,
                    const std::function<double(int32_t rank, const Attend&)>& attend_us);

}  // namespace wh::sharded
