#include "parallel/shards.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "core/names.h"

namespace wh::sharded {
namespace {

int64_t cut(int64_t length, int64_t parts, int64_t i) {
  return length / parts * i + std::min(i, length % parts);
}

Status validate_tokens(const char* name, const Sharding& sharding, int64_t length) {
  Tokens all;
  for (size_t rank = 0; rank < sharding.size(); ++rank) {
    for (const TokenRange& range : sharding[rank]) {
      if (range.begin < 0 || range.end > length || range.begin > range.end) {
        return invalid(fmt::format("rank {} holds {} tokens {} to {}; they must lie in 0 to {}",
                                   rank, name, range.begin, range.end, length));
      }
      if (!range.empty()) all.push_back(range);
    }
  }
  std::sort(all.begin(), all.end(), [](TokenRange a, TokenRange b) { return a.begin < b.begin; });
  int64_t end = 0;
  for (const TokenRange& range : all) {
    if (range.begin != end) {
      return invalid(fmt::format("{} token {} belongs to {}; each must belong to one rank", name,
                                 std::min(range.begin, end),
                                 range.begin < end ? "two ranks" : "no rank"));
    }
    end = range.end;
  }
  if (end == length) return {};
  return invalid(
      fmt::format("{} token {} belongs to no rank; each must belong to one rank", name, end));
}

// As many pages as the keys fill, none shared.
void set_full_pages(Problem& p) {
  if (p.key_layout != KeyLayout::kPaged) return;
  p.stride_page_table = p.pages_a_sequence();
  p.pages = p.batch * p.stride_page_table;
}

// What no strategy knows how to cut.
Status validate_kind(const Problem& p) {
  if (p.pass == Pass::kBackward) {
    return invalid("pass is backward; a sharded problem must be of the forward pass");
  }
  if (p.f32_out) return invalid("f32_out is true; of a sharded problem it must be false");
  if (is_quantised(p)) {
    return invalid(
        fmt::format("quantised_k is {} and quantised_v {}; of a sharded problem both "
                    "must be none",
                    kQuantiseds.name(p.quantised_k), kQuantiseds.name(p.quantised_v)));
  }
  if (p.query_layout == QueryLayout::kPacked) {
    return invalid("query_layout is packed; of a sharded problem it must be dense");
  }
  if (p.key_layout == KeyLayout::kPacked) {
    return invalid("key_layout is packed; of a sharded problem it must be dense or paged");
  }
  if (p.has_page_offsets) {
    return invalid("uses says page_offsets; the page table of a sharded problem must have rows");
  }
  return {};
}

}  // namespace

TokenRange intersection(TokenRange a, TokenRange b) {
  return {std::max(a.begin, b.begin), std::min(a.end, b.end)};
}

TokenRange hull(TokenRange a, TokenRange b) {
  if (a.empty()) return b;
  if (b.empty()) return a;
  return {std::min(a.begin, b.begin), std::max(a.end, b.end)};
}

int64_t count(const Tokens& tokens) {
  int64_t sum = 0;
  for (const TokenRange& range : tokens) sum += range.size();
  return sum;
}

Sharding contiguous(int64_t length, int32_t ranks) {
  Sharding sharding;
  for (int32_t i = 0; i < ranks; ++i) {
    sharding.push_back({{cut(length, ranks, i), cut(length, ranks, i + 1)}});
  }
  return sharding;
}

Sharding zigzag(int64_t length, int32_t ranks) {
  Sharding sharding;
  const int64_t parts = int64_t{2} * ranks;
  for (int64_t i = 0; i < ranks; ++i) {
    const int64_t j = parts - 1 - i;
    sharding.push_back({{cut(length, parts, i), cut(length, parts, i + 1)},
                        {cut(length, parts, j), cut(length, parts, j + 1)}});
  }
  return sharding;
}

Problem with_dense_keys(Problem p) {
  if (p.key_layout != KeyLayout::kPaged) return p;
  p.key_layout = KeyLayout::kDense;
  p.page_size = p.pages = p.stride_page_table = 0;
  p.stride_k = dense_strides(p.heads_kv, p.len_k, p.dim_qk);
  p.stride_v = p.values_in_keys ? p.stride_k : dense_strides(p.heads_kv, p.len_k, p.dim_v);
  return p;
}

ShardedProblem shard(const Problem& whole, Sharding q, Sharding k) {
  ShardedProblem sharded{whole, std::move(q), std::move(k), {}, {}, {}};
  set_full_pages(sharded.whole);
  for (int32_t rank = 0; rank < sharded.ranks(); ++rank) {
    Problem local = whole;
    local.len_q = sharded.local_len_q(rank);
    local.len_k = sharded.local_len_k(rank);
    set_full_pages(local);
    set_dense(local);
    sharded.layouts.push_back({local.stride_q, local.stride_k, local.stride_v, local.stride_out,
                               local.pages, local.stride_page_table});
  }
  return sharded;
}

Problem local_problem(const ShardedProblem& s, int32_t rank) {
  const LocalLayout& layout = s.layouts[static_cast<size_t>(rank)];
  Problem local = s.whole;
  local.len_q = s.local_len_q(rank);
  local.len_k = s.local_len_k(rank);
  local.stride_q = layout.q;
  local.stride_k = layout.k;
  local.stride_v = layout.v;
  local.stride_out = layout.out;
  local.pages = layout.pages;
  local.stride_page_table = layout.stride_page_table;
  return local;
}

Status validate(const ShardedProblem& s) {
  if (s.q.empty() || s.q.size() != s.k.size() || s.q.size() != s.layouts.size()) {
    return invalid(
        fmt::format("tokens of q are given for {} ranks, of k for {}, layouts for {}; "
                    "there must be as many of each, and at least one",
                    s.q.size(), s.k.size(), s.layouts.size()));
  }
  WH_RETURN_IF_ERROR(validate_kind(s.whole));
  for (int32_t rank = 0; rank < s.ranks(); ++rank) {
    if (Status status = validate(local_problem(s, rank)); !status.ok()) {
      return {status.code(), fmt::format("rank {}: {}", rank, status.message())};
    }
  }
  WH_RETURN_IF_ERROR(validate_tokens("q", s.q, s.whole.len_q));
  WH_RETURN_IF_ERROR(validate_tokens("k", s.k, s.whole.len_k));
  const auto check = [&](const char* name, bool is_used, const std::vector<int32_t>& values,
                         int64_t most) -> Status {
    if (values.size() != (is_used ? static_cast<size_t>(s.whole.batch) : 0)) {
      return invalid(fmt::format("{} holds {} numbers; it must hold {}", name, values.size(),
                                 is_used ? s.whole.batch : 0));
    }
    for (size_t b = 0; b < values.size(); ++b) {
      if (values[b] >= 0 && values[b] <= most) continue;
      return invalid(
          fmt::format("{}[{}] is {}; it must be between 0 and {}", name, b, values[b], most));
    }
    return {};
  };
  WH_RETURN_IF_ERROR(check("key_lengths", s.whole.has_key_lengths, s.key_lengths, s.whole.len_k));
  return check("key_starts", s.whole.has_key_starts, s.key_starts, kMaxLength);
}

}  // namespace wh::sharded
