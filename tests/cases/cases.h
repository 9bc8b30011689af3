// THE case table: problems that every kernel is checked on, generated from a seed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan/limits.h"
#include "verify/input.h"

namespace wh {

enum class CaseSet : uint8_t {
  kSmoke,    // some 200 small ones, for sanitizers
  kCi,       // 3,400: every lists' values, in random combinations
  kFull,     // 30,000 of the same
  kLayouts,  // 3,200 with packed queries, packed keys or keys in pages
  kRagged,   // 24 of decode, of 3 to 64 sequences with 1 to 65,536 keys each (4,096 on a CPU)
  kCorner,   // few, each for one thing that went wrong somewhere
  kLarge,    // few, of the sizes that people run: many tiles a multiprocessor, up to 262,144 keys
};

enum class Layout : uint8_t {
  kDense,            // [batch, heads, length, dim]
  kLengthFirst,      // [batch, length, heads, dim]
  kPadded,           // rows padded to an odd stride
  kPaddedBy16Bytes,  // of 16-bit elements: TMA can step over it
  kSharedHeads,      // every kv head reads the same K and V: stride 0
  kDimStrided,       // every second element
};

struct Case : Input {
  std::string name;
  Limits limits;
  int64_t sampled_rows = 0;  // so many are compared with float64; 0: all
};

std::vector<Case> make_cases(CaseSet set, Device device, uint64_t seed);

std::vector<Case> make_ragged_cases(Device device, uint64_t seed);

// CaseSet::kLarge with every length divided by `shrink`: on a GPU as they are, on a CPU smaller.
std::vector<Case> make_large_cases(Device device, uint64_t seed, int64_t shrink);

}  // namespace wh
