// VDPBF16PS as fast as it goes. Compiled with flags of its own: only for CPUs with AVX512-BF16.
#pragma once

#include <cstdint>

namespace wh::cli {

constexpr int kBf16Chains = 12;
constexpr int64_t kBf16Flops = int64_t{kBf16Chains} * 16 * 2 * 2;  // of a repetition

float bf16_products(int64_t repetitions);

}  // namespace wh::cli
