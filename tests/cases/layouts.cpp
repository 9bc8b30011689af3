#include "layouts.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace wh {
namespace {

constexpr int64_t kPageSizes[] = {1, 2, 4, 8, 16, 16, 48, 64, 64, 528};

class Drawer {
 public:
  Drawer(Case& c, std::mt19937_64& random) : c_(c), p_(c.problem), random_(random) {}

  void draw() {
    p_.batch = between(1, 5);
    c_.key_lengths.clear();
    c_.key_starts.clear();
    constexpr QueryLayout kQueries[] = {QueryLayout::kDense, QueryLayout::kPacked};
    constexpr KeyLayout kKeys[] = {KeyLayout::kDense, KeyLayout::kPacked, KeyLayout::kPaged,
                                   KeyLayout::kPaged, KeyLayout::kPaged};
    do {
      p_.query_layout = kQueries[random_() % 2];
      p_.key_layout = kKeys[random_() % 5];
    } while (p_.is_dense());
    draw_queries();
    draw_keys();
    for (int64_t b = 0; p_.has_key_starts && b < p_.batch; ++b) {
      c_.key_starts.push_back(static_cast<int32_t>(between(0, p_.len_k + 2)));
    }
    draw_strides();
  }

 private:
  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, std::max(low, high))(random_);
  }
  bool one_in(uint64_t n) { return random_() % n == 0; }

  // Of one sequence: often the most, one, none, or beside a multiple of what tiles and pages hold.
  int64_t length(int64_t most, int64_t unit) {
    if (one_in(6)) return 0;
    if (one_in(4)) return most;
    if (one_in(4)) return std::min<int64_t>(1, most);
    const int64_t any = between(0, most);
    if (one_in(2)) return any;
    return std::clamp<int64_t>(any / unit * unit + between(-1, 1), 0, most);
  }

  std::vector<int32_t> offsets(int64_t most, int64_t unit) {
    std::vector<int32_t> offsets{0};
    for (int64_t b = 0; b < p_.batch; ++b) {
      offsets.push_back(offsets.back() + static_cast<int32_t>(length(most, unit)));
    }
    return offsets;
  }

  void draw_queries() {
    if (p_.query_layout == QueryLayout::kDense) return;
    p_.mask = MaskKind::kNone;
    c_.query_offsets = offsets(p_.len_q, 16);
    p_.total_q = std::max<int64_t>(1, c_.query_offsets.back() + (one_in(2) ? between(0, 9) : 0));
  }

  void draw_keys() {
    switch (p_.key_layout) {
      case KeyLayout::kDense:
        for (int64_t b = 0; p_.has_key_lengths && b < p_.batch; ++b) {
          c_.key_lengths.push_back(static_cast<int32_t>(length(p_.len_k, 48)));
        }
        return;
      case KeyLayout::kPacked:
        c_.key_offsets = offsets(p_.len_k, 48);
        p_.total_k = c_.key_offsets.back() + (one_in(2) ? between(0, 9) : 0);
        for (int64_t b = 0; p_.has_key_lengths && b < p_.batch; ++b) {
          const auto i = static_cast<size_t>(b);
          c_.key_lengths.push_back(
              static_cast<int32_t>(between(0, c_.key_offsets[i + 1] - c_.key_offsets[i])));
        }
        return;
      case KeyLayout::kPaged:
        return draw_pages();
    }
  }

  void draw_pages() {
    p_.page_size = kPageSizes[random_() % std::size(kPageSizes)];
    p_.has_key_lengths = true;
    p_.has_page_offsets = one_in(3);
    for (int64_t b = 0; b < p_.batch; ++b) {
      c_.key_lengths.push_back(static_cast<int32_t>(length(p_.len_k, p_.page_size)));
    }
    p_.pages = p_.batch * p_.pages_a_sequence() + between(0, 3);
    std::vector<int32_t> pool(static_cast<size_t>(p_.pages));
    std::iota(pool.begin(), pool.end(), 0);
    std::shuffle(pool.begin(), pool.end(), random_);
    if (p_.has_page_offsets)
      c_.page_offsets.push_back(0);
    else
      p_.stride_page_table = p_.pages_a_sequence() + between(0, 3);
    const bool shares = one_in(3);  // the first pages are every sequence's, as of a system prompt
    for (int64_t b = 0; b < p_.batch; ++b) {
      const int64_t used =
          (c_.key_lengths[static_cast<size_t>(b)] + p_.page_size - 1) / p_.page_size;
      const int64_t entries = p_.has_page_offsets ? used + between(0, 2) : p_.stride_page_table;
      for (int64_t i = 0; i < entries; ++i)
        c_.page_table.push_back(entry(b, i, used, shares, pool));
      if (p_.has_page_offsets) {
        c_.page_offsets.push_back(static_cast<int32_t>(c_.page_table.size()));
      }
    }
    if (p_.has_page_offsets) {
      p_.page_entries = static_cast<int64_t>(c_.page_table.size());
    } else if (!c_.page_table.empty()) {
      c_.page_table.resize(c_.page_table.size() -
                           static_cast<size_t>(p_.stride_page_table - p_.pages_a_sequence()));
    }
  }

  int32_t entry(int64_t b, int64_t i, int64_t used, bool shares, const std::vector<int32_t>& pool) {
    constexpr int32_t kAnything[] = {-1, std::numeric_limits<int32_t>::min(),
                                     std::numeric_limits<int32_t>::max()};
    if (i >= used) return kAnything[random_() % 3];
    const int64_t owner = shares && i < used / 2 ? 0 : b;
    return pool[static_cast<size_t>(owner * p_.pages_a_sequence() + i)];
  }

  // Token by token, head by head, or with gaps between rows, as where K and V share an allocation:
  // odd ones, of 16 bytes, and of a block of quantised elements.
  static constexpr int64_t kGaps[] = {0, 0, 3, 8, 32};
  static Strides strides(int64_t heads, int64_t length, int64_t dim, int64_t layout) {
    const int64_t row = dim + kGaps[layout];
    const int64_t between_pages = layout == 1 ? heads * length * dim : 0;  // V's, behind K's
    if (layout == 0) return {length * heads * row, length * row, row, 1};
    return {length * heads * row + between_pages, row, heads * row, 1};
  }

  void draw_strides() {
    const int64_t of_queries = p_.query_layout == QueryLayout::kPacked ? p_.total_q : p_.len_q;
    const int64_t of_keys = p_.key_layout == KeyLayout::kPaged
                                ? p_.page_size
                                : (p_.key_layout == KeyLayout::kPacked ? p_.total_k : p_.len_k);
    const int64_t most = std::size(kGaps) - 1;
    const int64_t layout_q = between(0, most), layout_k = between(0, most);
    const int64_t dim_v = p_.dim_v;
    p_.stride_q = strides(p_.heads_q, of_queries, p_.dim_qk, layout_q);
    p_.stride_out = strides(p_.heads_q, of_queries, dim_v, layout_q);
    p_.stride_k = strides(p_.heads_kv, of_keys, p_.dim_qk, layout_k);
    p_.values_in_keys = dim_v <= p_.dim_qk && one_in(6);
    p_.stride_v = p_.values_in_keys ? p_.stride_k : strides(p_.heads_kv, of_keys, dim_v, layout_k);
    if (!p_.values_in_keys && one_in(8)) p_.stride_k[1] = p_.stride_v[1] = 0;
    if (p_.mask != MaskKind::kNone) p_.stride_mask = dense_strides(p_.heads_q, p_.len_q, p_.len_k);
  }

  Case& c_;
  Problem& p_;
  std::mt19937_64& random_;
};

}  // namespace

void draw_layout(Case& c, std::mt19937_64& random) { Drawer(c, random).draw(); }

}  // namespace wh
