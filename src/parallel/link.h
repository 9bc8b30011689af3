// What connects ranks, measured.
#pragma once

#include "core/names.h"
#include "parallel/communicator.h"
#include "parallel/simulation.h"
#include "plan/backend.h"

namespace wh::sharded {

// Of messages between neighbours, all ranks at once and both ways, as a ring has them; the same
// answer on every rank. Takes 64 MiB of the device's memory, and well below a second.
Result<Link> measure_link(Communicator& communicator, Device device, int32_t device_index,
                          double memory_gbytes_per_s);

}  // namespace wh::sharded
