// Tensors on the host: random data where something may be read, poison everywhere else.
#pragma once

#include <array>
#include <cstddef>
#include <vector>

#include "verify/input.h"

namespace wh {

// Elements of one tensor between two guards. Whatever no element of the tensor owns (padding of
// rows, gaps of strides, the guards) is filled with NaN bits.
class GuardedTensor {
 public:
  GuardedTensor() = default;
  explicit GuardedTensor(int64_t bytes);

  // Null for a tensor that is not there at all.
  std::byte* data() { return bytes_.empty() ? nullptr : bytes_.data() + kGuardBytes; }
  const std::byte* data() const { return bytes_.empty() ? nullptr : bytes_.data() + kGuardBytes; }
  int64_t size() const { return size_; }
  bool guards_intact() const;
  // With the guards.
  std::byte* all() { return bytes_.data(); }
  size_t all_bytes() const { return bytes_.size(); }
  // All of it, to see whether somebody wrote there.
  uint64_t fingerprint() const;

  static constexpr int64_t kGuardBytes = 256;

 private:
  std::vector<std::byte> bytes_;  // aligned by being offset: see the constructor
  int64_t size_ = 0;
};

struct HostTensors {
  explicit HostTensors(const Input& input);

  Tensors tensors();           // of this data, without a workspace
  void poison_outputs();       // before every run
  std::string damage() const;  // which tensor was written where it must not be; empty: none

  Problem problem;
  bool v_is_k = false;
  GuardedTensor q, k, v, out, mask, sinks, key_lengths, key_starts, log_sum_exp;
  float largest_value = 0;  // of |v|, poison aside

 private:
  static constexpr int kInputs = 7;
  struct Named {
    const char* name;
    const GuardedTensor* tensor;
  };
  std::array<Named, kInputs> inputs() const;

  std::array<uint64_t, kInputs> fingerprints_{};
  std::vector<uint8_t> out_owned_;  // whether each byte of `out` is an element's; empty: all are
};

}  // namespace wh
