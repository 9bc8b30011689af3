// Which SIMD target the CPU kernels dispatch to on this machine.
#pragma once

#include <cstdint>

namespace wh::cpu {

const char* simd_target_name();  // Highway's name: "AVX3", "AVX2", "NEON", ...
int32_t simd_floats();           // f32 lanes of that target

}  // namespace wh::cpu
