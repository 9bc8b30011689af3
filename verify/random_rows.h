// Random numbers of one row, the same whoever draws the other rows and in whatever order.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace wh {

inline uint64_t mix(uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
  return bits ^ (bits >> 31);
}

class RowRandom {
 public:
  RowRandom(uint64_t seed, uint64_t stream, int64_t row)
      : state_(mix(mix(seed + 0x9e3779b97f4a7c15u * stream) + static_cast<uint64_t>(row))) {}

  uint64_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return mix(state_);
  }
  // From a table at random places: true ones take twenty times as long.
  float normal() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return table()[state_ >> 48];
  }

 private:
  static const float* table() {
    static const std::vector<float> values = [] {
      std::vector<float> made(65536);
      std::mt19937_64 random(1);
      std::normal_distribution<float> normal;
      for (float& value : made) value = normal(random);
      return made;
    }();
    return values.data();
  }

  uint64_t state_;
};

}  // namespace wh
