// What every Hopper kernel needs that is fed by TMA and multiplies by wgmma.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "core/status.h"
#include "cuda/common/packed_rows.h"
#include "plan/kernel.h"

namespace wh::cuda {

// Card, types, precision, extents and strides, and which codes are widened in shared memory;
// nullopt: nothing stands in the way.
std::optional<std::string> sm90_refusal(const Query& query);

// Of a tensor that is written 8 bytes at a time, and read so.
std::optional<std::string> store_refusal(const char* name, const Strides& strides);

// For which of a kernel's instances a problem is.
Layouts layouts_of(const Problem& problem);

// Keys in pages that TMA takes at once: a power of 2 that divides a page and `rows` of a tile, 8 at
// least, a whole turn of the swizzle. Where keys are not paged, all rows.
int32_t box_keys(const Problem& problem, int32_t rows);

// Boxes in which TMA brings so many columns of K or V: of 64, of codes 128.
int row_boxes(const Problem& problem, int columns);

// What a multiprocessor takes to ask for so many boxes by a warp. 0 where keys are not paged. Of 16
// rows and 64 columns, on an H200: 0.062 us each in prefill of dim 256, whose keys L2 has, 0.08
// where they come from memory at once (prefill of dim 128, decode of 512), no more than 0.08 and
// 0.07 in decode of 64 and 256, which takes as long as over dense keys. A lone thread needed 0.1 to
// 0.15.
double boxes_us(const Problem& problem, double boxes);

// Whether the pointers of a run are aligned as TMA (q, k, v: 16 bytes) and vector stores (out: 8
// bytes) need.
Status check_alignment(const Problem& problem, const Tensors& tensors);
Status check_alignment(const char* name, const void* pointer, uintptr_t bytes);

}  // namespace wh::cuda
