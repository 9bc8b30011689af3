#include "measure/resident.h"

#include <malloc.h>

#include <fstream>
#include <string>

namespace wh::cli {
namespace {

uint64_t status_bytes(const std::string& name) {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    uint64_t kib = 0;
    if (word == name && status >> kib) return kib << 10;
  }
  return 0;
}

}  // namespace

uint64_t resident_bytes() {
  malloc_trim(0);
  return status_bytes("VmRSS:");
}

void restart_peak() {
  malloc_trim(0);
  std::ofstream("/proc/self/clear_refs") << 5;
}

uint64_t peak_resident_bytes() { return status_bytes("VmHWM:"); }

}  // namespace wh::cli
