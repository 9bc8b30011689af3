// Tensors on the host: random data where something may be read and, where the input is hostile,
// poison everywhere else.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "verify/input.h"

namespace wh {

// Elements of one tensor between two guards. Whatever no element of the tensor owns (padding of
// rows, gaps of strides, the guards) is filled with NaN bits.
class GuardedTensor {
 public:
  GuardedTensor() = default;
  // `misaligned_by` so many bytes from a boundary of 64.
  explicit GuardedTensor(int64_t bytes, int64_t misaligned_by = 0);

  // Null for a tensor that is not there at all.
  std::byte* data() const { return memory_ == nullptr ? nullptr : all() + kGuardBytes; }
  int64_t size() const { return size_; }
  bool guards_intact() const;
  // All of it, to see whether somebody wrote there.
  uint64_t fingerprint() const;

  static constexpr int64_t kGuardBytes = 256;

 private:
  struct Release {
    void operator()(std::byte* memory) const;
  };
  std::byte* all() const { return memory_.get() + misaligned_by_; }
  int64_t all_bytes() const { return memory_ == nullptr ? 0 : size_ + 2 * kGuardBytes; }

  std::unique_ptr<std::byte[], Release> memory_;
  int64_t size_ = 0, misaligned_by_ = 0;
};

struct HostTensors {
  HostTensors() = default;
  explicit HostTensors(const Input& input);

  Tensors tensors() const;     // of this data, without a workspace
  int64_t bytes() const;       // of all of them
  void poison_outputs();       // before every run
  std::string damage() const;  // which tensor was written where it must not be; empty: none

  Problem problem;
  bool v_is_k = false;
  GuardedTensor q, k, v, scales_k, scales_v, out, mask, sinks, key_lengths, key_starts, log_sum_exp,
      query_offsets, key_offsets, page_table, page_offsets;
  float largest_value = 0;  // of |v|, poison aside

 private:
  struct Named {
    const char* name;
    const GuardedTensor* tensor;
  };
  std::vector<Named> inputs() const;
  void find_owned_bytes();

  std::vector<uint64_t> fingerprints_;  // of the inputs; empty: nobody looks
  std::vector<uint8_t> out_owned_;  // whether each byte of `out` is an element's; empty: all are
};

}  // namespace wh
