// What every Hopper kernel needs that is fed by TMA and multiplies by wgmma.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "core/status.h"
#include "plan/kernel.h"

namespace wh::cuda {

// Card, types, precision, extents and strides; nullopt: nothing stands in the way.
std::optional<std::string> sm90_refusal(const Query& query);

// Of a tensor that is written 8 bytes at a time, and read so.
std::optional<std::string> store_refusal(const char* name, const Strides& strides);

// Whether the pointers of a run are aligned as TMA (q, k, v: 16 bytes) and vector stores (out: 8
// bytes) need.
Status check_alignment(const Problem& problem, const Tensors& tensors);
Status check_alignment(const char* name, const void* pointer, uintptr_t bytes);

}  // namespace wh::cuda
