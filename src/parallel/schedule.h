// What one rank does, step by step, as plain data: made by a strategy, timed by the simulation and
// carried out by the executor.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "core/problem.h"

namespace wh::sharded {

// The rank's own tensors; from 0 on: a buffer of the schedule's.
enum Where : int32_t {
  kNowhere = -1,
  kQ = -2,
  kK = -3,
  kV = -4,
  kOut = -5,
  kLogSumExp = -6,
  kMask = -7,
  kSinks = -8,
  kPageTable = -9
};
struct Place {
  int32_t where = kNowhere;
  int64_t offset_bytes = 0;
};

// A tensor [batch, heads, tokens, dim] somewhere.
struct TensorAt {
  Place place;
  Strides strides{};
  int64_t element_bytes = 0;

  TensorAt at(int64_t batch_idx, int64_t head, int64_t token) const {
    TensorAt moved = *this;
    moved.place.offset_bytes +=
        (batch_idx * strides[0] + head * strides[1] + token * strides[2]) * element_bytes;
    return moved;
  }
};

struct Copy {
  TensorAt from, to;
  std::array<int64_t, 4> extents;  // batch, heads, tokens, dim

  int64_t bytes() const {
    return extents[0] * extents[1] * extents[2] * extents[3] * from.element_bytes;
  }
};

struct Attend {
  Problem problem;
  Place q, k, v, out, log_sum_exp, mask, sinks, page_table, key_lengths, key_starts;
  int32_t plan = -1;  // of the schedule's
};

// log_sum_exp [batch, heads, tokens]: a tensor of one column.
struct Part {
  TensorAt out, log_sum_exp;
  Dtype dtype;
};
struct Merge {
  std::array<int64_t, 4> extents;
  Part merged;  // without a log-sum-exp where nobody wants it
  Place sinks;
  std::vector<Part> parts;
};

struct Message {
  int32_t peer;
  bool is_send;
  Place place;
  int64_t bytes;
};
// Messages between two ranks meet in the order in which both start them.
struct Start {
  int32_t exchange;
  std::vector<Message> messages;
};
struct Finish {
  int32_t exchange;
};

// Numbers that kernels read, known before anything runs.
struct Write {
  Place to;
  std::vector<int32_t> numbers;
};

using Step = std::variant<Copy, Attend, Merge, Start, Finish, Write>;

struct Schedule {
  std::vector<Step> steps;
  std::vector<int64_t> buffers;  // bytes of each

  int64_t sent_bytes() const;
};

}  // namespace wh::sharded
