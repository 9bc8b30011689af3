// What this CPU can do at best: multiply-adds on all threads, and reading memory.
#pragma once

#include <cstdint>

namespace wh::cli {

// f32 GFLOP/s of independent multiply-adds on `threads` threads, over about `us` microseconds.
double multiply_add_gflops(int32_t threads, double us);

// GB/s of reading 512 MB once on `threads` threads.
double read_gbytes_per_s(int32_t threads);

}  // namespace wh::cli
