// What a plan says of the instance that runs on Hopper: Kernel::variant.
#pragma once

#include <fmt/format.h>

#include <cstddef>
#include <string>

#include "core/names.h"
#include "cuda/common/variants.h"
#include "plan/kernel.h"

namespace wh::cuda {

// "bf16 wgmma, 256/256", over codes with how they are read. kVariants are those that
// Config::instance counts.
template <const auto& kVariants>
std::string wgmma_variant(const Query&, const Config& config) {
  const auto& variant = kVariants[static_cast<size_t>(config.instance)];
  const Instance& instance = variant.instance;
  return fmt::format("{} wgmma, {}/{}{}", kDtypes.name(instance.dtype), instance.dims.dim_qk,
                     instance.dims.dim_v,
                     reads_codes(variant) ? ", codes widened in shared memory" : "");
}

}  // namespace wh::cuda
