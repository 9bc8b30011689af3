// What the tensors of a problem hold.
#pragma once

#include <cstdint>
#include <vector>

#include "core/problem.h"

namespace wh {

enum class MaskPattern : uint8_t {
  kRandom,
  kWholeRows,
  kAlternatingKeys,
  kExtremes,  // additive: finite biases of every size, both ends of the type and denormals
};

// A problem, and what of its values is not left to chance.
struct Input {
  Problem problem;
  std::vector<int32_t> key_lengths, key_starts;                               // empty: not used
  std::vector<int32_t> query_offsets, key_offsets, page_table, page_offsets;  // as the layout asks
  MaskPattern mask_pattern = MaskPattern::kRandom;
  bool has_extreme_sinks = false;  // of the sizes of kExtremes
  // Rows of q are times 2^-40, 1 and 2^40, side by side; some hold an infinity or NaN.
  bool has_extreme_queries = false;
  float mean_v = 0;
  bool has_visible_nan = false;  // some K and V that rows do see hold NaN
  bool v_is_k = false;           // as Problem::values_in_keys, but the problem does not say so
  // NaN wherever nothing may be read, on boundaries of 16 bytes, and a look at what was written
  // where. Otherwise tensors are as a program for speed would have them: on boundaries of 64 bytes.
  bool is_hostile = true;
  uint64_t seed = 0;
};

}  // namespace wh
