// Hands out aligned pieces of a workspace. Run once with a null base it measures, run again with
// the real one it places: so the planned bytes and the used bytes cannot differ, not by a byte.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wh {

// Of a workspace, as callers must align it: a cache line. Pieces may ask for more within it.
constexpr size_t kWorkspaceAlignment = 64;

class Carver {
 public:
  explicit Carver(void* base, size_t alignment = kWorkspaceAlignment)
      : base_(static_cast<std::byte*>(base)), alignment_(alignment) {}

  // Null while it measures. What the alignment skips lies in front of a piece, never behind the
  // last.
  template <typename T>
  T* take(int64_t count) {
    if (count == 0) return nullptr;
    const size_t begin = aligned_end();
    end_ = begin + static_cast<size_t>(count) * sizeof(T);
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + begin);
  }
  size_t bytes() const { return end_; }
  size_t aligned_end() const { return (end_ + alignment_ - 1) / alignment_ * alignment_; }

 private:
  std::byte* base_;
  size_t alignment_;
  size_t end_ = 0;
};

// A scratch for each worker behind what they share, each as a Carver of its own lays it out.
class WorkerScratches {
 public:
  WorkerScratches() = default;
  WorkerScratches(const Carver& shared, const Carver& one)
      : shared_bytes_(shared.bytes()),
        first_(shared.aligned_end()),
        bytes_(one.bytes()),
        step_(one.aligned_end()) {}

  size_t bytes(int64_t workers) const {
    return workers == 0 || bytes_ == 0 ? shared_bytes_
                                       : first_ + static_cast<size_t>(workers - 1) * step_ + bytes_;
  }
  std::byte* at(void* base, int64_t worker) const {
    return static_cast<std::byte*>(base) + first_ + static_cast<size_t>(worker) * step_;
  }

 private:
  size_t shared_bytes_ = 0, first_ = 0, bytes_ = 0, step_ = 0;
};

}  // namespace wh
