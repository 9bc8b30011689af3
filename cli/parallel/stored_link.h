// The link between ranks that `widehead tune --parallel` measured here, for `widehead plan
// --ranks`.
#pragma once

#include <optional>
#include <string>

#include "input/embedded.h"
#include "parallel/ranks.h"
#include "parallel/simulation.h"

namespace wh::cli {

// Measures it as the group's ranks, prints it as --link takes it, or as JSON, and keeps it.
int tune_link(const Group& group, bool json);

struct StoredLink {
  sharded::Link link;
  std::string description;  // by what and when it was measured
};
// Beside the device's profile; nothing where none was measured or it cannot be read.
std::optional<StoredLink> stored_link(Device device, double memory_gbytes_per_s);

}  // namespace wh::cli
