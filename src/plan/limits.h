// What the caller allows: the second half of the planner's input.
#pragma once

#include <cstdint>
#include <limits>
#include <string>

#include "core/status.h"

namespace wh {

enum class Policy : uint8_t {
  kAutomatic,   // the fastest kernel that fits
  kFused,       // a fused kernel or an error with the reasons
  kFusedAbove,  // fused from Limits::fused_above keys on, unfused below: a fixed threshold
};

enum class Precision : uint8_t {
  kNative,  // weights rounded to the input type where the hardware multiplies that type
  kHigh,    // weights keep f32-class accuracy
};

constexpr int64_t kAnyKeys = -1;  // no promise about fresh keys
constexpr int32_t kMaxThreads = 4096;
constexpr uint64_t kNoByteLimit = std::numeric_limits<uint64_t>::max();

struct Limits {
  uint64_t workspace_bytes = kNoByteLimit;
  Policy policy = Policy::kAutomatic;
  int64_t fused_above = 16384;  // keys; 0: always fused
  std::string kernel;           // forces one kernel by name; empty: the planner chooses
  int32_t threads = 0;          // CPU threads; 0: every core
  Precision precision = Precision::kNative;
  double longest_step_us = 0;    // between two looks at the progress callback; 0: any
  bool batch_invariant = false;  // a row's bits do not depend on the batch around it
  // The promise that the kernel in front in the stream, and any that it overlaps, write no keys but
  // the last so many of each sequence, and no key lengths, key starts, offsets or page tables: the
  // rest may be read before that kernel has ended. Too small a number is a race that nobody
  // detects.
  int64_t fresh_keys = kAnyKeys;
  bool operator==(const Limits&) const = default;
};

Status validate(const Limits& limits);

}  // namespace wh
