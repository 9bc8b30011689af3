// Hands out 64-byte aligned pieces of a workspace. Run once with a null base it measures, run
// again with the real one it places: so the planned bytes and the used bytes cannot differ.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wh::cpu {

constexpr size_t kWorkspaceAlignment = 64;

class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<std::byte*>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + kWorkspaceAlignment - 1) /
             kWorkspaceAlignment * kWorkspaceAlignment;
    return piece;
  }
  size_t used_bytes() const { return used_; }

 private:
  std::byte* base_;
  size_t used_ = 0;
};

}  // namespace wh::cpu
