// What connects ranks, measured.
#pragma once

#include "core/names.h"
#include "parallel/communicator.h"
#include "parallel/simulation.h"
#include "plan/backend.h"

namespace wh::sharded {

struct DeviceMemory {
  Device device;
  int32_t device_index;
  double gbytes_per_s;
};

// Of messages between neighbours, all ranks at once and both ways, as a ring has them; the same
// answer on every rank. Takes 64 MiB of the device's memory, and well below a second; a wait for
// other ranks ends with `timeout`.
Result<Link> measure_link(Communicator& communicator, DeviceMemory memory,
                          std::chrono::milliseconds timeout);

}  // namespace wh::sharded
