// What this CPU can do at best: multiply-adds on all threads, and reading memory.
#pragma once

#include <cstdint>

namespace wh::cli {

// f32 GFLOP/s of independent multiply-adds on `threads` threads at once, over about `us`
// microseconds. Where they do not run at once, it is as low as that makes it.
double multiply_add_gflops(int32_t threads, double us);

// The same of VDPBF16PS, the best of 100; 0 where the CPU has none.
double bf16_gflops(int32_t threads);

// GB/s of reading 512 MB once on `threads` threads.
double read_gbytes_per_s(int32_t threads);

// The last level of cache; 0 where the system does not tell.
int64_t last_level_cache_bytes();

}  // namespace wh::cli
