// Batches of which one sequence has as many keys as many others together, as servers decode them:
// kernels that share keys by their total cut each sequence into another number of shares.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "cases.h"

namespace wh {
namespace {

struct Shape {
  int64_t heads_q, heads_kv, dim_qk, dim_v;
};
// Groups of 1 to 64, and the same memory as K and V.
constexpr Shape kShapes[] = {{2, 2, 128, 128}, {4, 1, 128, 128},  {32, 2, 128, 128},
                             {8, 1, 256, 256}, {32, 2, 256, 256}, {16, 1, 576, 512},
                             {64, 1, 64, 64},  {8, 1, 512, 512}};
constexpr int64_t kPacked = 0, kPageSizes[] = {kPacked, 16, 64};
constexpr int64_t kSampledRows = 64;

class RaggedCase {
 public:
  RaggedCase(Device device, uint64_t seed, const Shape& shape, int64_t page_size) : random_(seed) {
    p_.device = device;
    c_.seed = seed;
    c_.sampled_rows = kSampledRows;
    p_.dtype_q = p_.dtype_kv = random_() % 2 == 0 ? Dtype::kBf16 : Dtype::kF16;
    p_.heads_q = shape.heads_q;
    p_.heads_kv = shape.heads_kv;
    p_.dim_qk = shape.dim_qk;
    p_.dim_v = shape.dim_v;
    p_.values_in_keys = shape.dim_qk > shape.dim_v;
    // A CPU takes seconds for what a GPU is to balance.
    p_.len_k = device == Device::kCuda ? 65536 : 4096;
    p_.batch = between(3, std::min<int64_t>(64, 10000 / (shape.dim_qk * shape.heads_kv)));
    // A group of several queries fills no more than a tile of rows.
    p_.len_q = std::clamp<int64_t>(64 / p_.group(), 1, 3);
    p_.causal = Causal::kBottomRight;
    p_.wants_log_sum_exp = random_() % 2 == 0;
    p_.has_sinks = random_() % 4 == 0;
    draw_queries();
    draw_keys(page_size);
    set_dense(p_);
    c_.name = describe(p_);
  }
  const Case& drawn() const { return c_; }

 private:
  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }

  void draw_queries() {
    p_.query_layout = QueryLayout::kPacked;
    c_.query_offsets = {0};
    for (int64_t b = 0; b < p_.batch; ++b) {
      const int64_t count = random_() % 10 == 0 ? 0 : between(1, p_.len_q);
      c_.query_offsets.push_back(c_.query_offsets.back() + static_cast<int32_t>(count));
    }
    p_.total_q = std::max<int64_t>(1, c_.query_offsets.back());
  }

  // The first has the most, the second a single key, the others log-uniform many.
  void draw_keys(int64_t page_size) {
    std::vector<int32_t> lengths{static_cast<int32_t>(p_.len_k), 1};
    while (static_cast<int64_t>(lengths.size()) < p_.batch) {
      const double exponent = std::uniform_real_distribution<double>(0, 1)(random_);
      lengths.push_back(static_cast<int32_t>(std::pow(static_cast<double>(p_.len_k), exponent)));
    }
    std::shuffle(lengths.begin(), lengths.end(), random_);
    if (page_size == kPacked) {
      p_.key_layout = KeyLayout::kPacked;
      c_.key_offsets = {0};
      for (const int32_t length : lengths) c_.key_offsets.push_back(c_.key_offsets.back() + length);
      p_.total_k = c_.key_offsets.back();
      return;
    }
    p_.key_layout = KeyLayout::kPaged;
    p_.has_key_lengths = true;
    p_.page_size = page_size;
    p_.stride_page_table = p_.pages_a_sequence();
    c_.key_lengths = lengths;
    std::vector<int32_t> pool;
    for (const int32_t length : lengths) {
      p_.pages += (length + page_size - 1) / page_size;
    }
    pool.resize(static_cast<size_t>(p_.pages));
    std::iota(pool.begin(), pool.end(), 0);
    std::shuffle(pool.begin(), pool.end(), random_);
    for (const int32_t length : lengths) {
      for (int64_t i = 0; i < p_.stride_page_table; ++i) {
        const bool is_used = i * page_size < length;
        c_.page_table.push_back(is_used ? pool.back() : -1);
        if (is_used) pool.pop_back();
      }
    }
  }

  std::mt19937_64 random_;
  Case c_;
  Problem& p_ = c_.problem;
};

}  // namespace

std::vector<Case> make_ragged_cases(Device device, uint64_t seed) {
  std::vector<Case> cases;
  for (const Shape& shape : kShapes) {
    for (const int64_t page_size : kPageSizes) {
      cases.push_back(RaggedCase(device, seed + cases.size(), shape, page_size).drawn());
    }
  }
  return cases;
}

}  // namespace wh
