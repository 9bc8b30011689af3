// What the process holds in memory, as Linux counts it; 0 where nothing counts it.
#pragma once

#include <cstdint>

namespace wh::cli {

// Less what was freed and the allocator keeps.
uint64_t resident_bytes();
// The most since the start, or since restart_peak().
uint64_t peak_resident_bytes();
void restart_peak();

}  // namespace wh::cli
