// What every device says of itself; a backend's own facts derive from it. Injectable, so that tests
// can plan for any machine.
#pragma once

#include <cstdint>
#include <string>

namespace wh {

struct DeviceFacts {
  std::string unavailable;   // why no kernel can run there; empty: it can
  std::string name;          // the model, for messages and profiles
  std::string kernels_use;   // instruction sets or compute capability, for people
  int32_t cores = 0;         // threads of the program that kernels may use; 0: they use none
  int64_t l2_bytes = 0;      // of one core, where each has its own
  double tensor_tflops = 0;  // dense bf16, of units for matrices; 0: there are none
  double read_gbytes_per_s = 0;
};

}  // namespace wh
