// A sharded problem with random tensors on the host: what each rank holds, and the whole's answer.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/element.h"
#include "core/sequence.h"
#include "parallel/plan.h"
#include "verify/answer.h"
#include "verify/elements.h"
#include "verify/errors.h"
#include "verify/host_tensors.h"
#include "verify/rows.h"

namespace wh::sharded {

// Elements of a vector that are not written where it grows: whoever fills them does, on all cores.
template <typename T>
struct Unwritten : std::allocator<T> {
  template <typename U>
  struct rebind {
    using other = Unwritten<U>;
  };
  template <typename U>
  void construct(U* element) noexcept {
    ::new (static_cast<void*>(element)) U;
  }
  template <typename U, typename... Arguments>
  void construct(U* element, Arguments&&... arguments) {
    ::new (static_cast<void*>(element)) U(std::forward<Arguments>(arguments)...);
  }
};
using Bytes = std::vector<std::byte, Unwritten<std::byte>>;

// One rank's tensors. Gaps and what nobody may read hold NaN bits, as in the whole's.
struct LocalTensors {
  Bytes q, k, v, out;
  std::vector<float> log_sum_exp;
  std::vector<int32_t>
      page_table;  // pages in random order, where there is a key to be seen in them
};

// Some rows of a rank's out, and what they should be.
struct SampledRows {
  struct Row {
    size_t begin_bytes, size_bytes;  // from the first to the last of its elements
  };
  std::vector<Row> rows;
  Expected expected;
};

class ShardedData {
 public:
  ShardedData(const Input& input, ShardedProblem sharded)
      : data_(dense(input)), sharded_(std::move(sharded)) {}

  const ShardedProblem& problem() const { return sharded_; }
  // With dense keys, however the ranks have them.
  const Problem& whole() const { return data_.problem; }

  LocalTensors local(int32_t rank) const {
    const Problem& p = whole();
    const LocalLayout& s = sharded_.layouts[static_cast<size_t>(rank)];
    LocalTensors t;
    const Tokens& of_q = sharded_.q[static_cast<size_t>(rank)];
    const Tokens& of_k = sharded_.k[static_cast<size_t>(rank)];
    t.page_table = page_table(rank);
    const Problem shape = local_problem(sharded_, rank);
    const auto of_query = [](int64_t b, int64_t i) { return At{b, i}; };
    const auto of_key = [&](int64_t b, int64_t i) -> At {
      if (t.page_table.empty()) return {b, i};
      const int64_t entry = b * s.stride_page_table + i / shape.page_size;
      return {t.page_table[static_cast<size_t>(entry)], i % shape.page_size};
    };
    t.q = cut(data_.q, p.dtype_q, p.stride_q, of_q, p.heads_q, p.dim_qk, query_storage(shape), s.q,
              of_query);
    const Storage keys = key_storage(shape);
    t.k = cut(data_.k, p.dtype_kv, p.stride_k, of_k, p.heads_kv, p.dim_qk, keys, s.k, of_key);
    if (!p.values_in_keys) {
      t.v = cut(data_.v, p.dtype_kv, p.stride_v, of_k, p.heads_kv, p.dim_v, keys, s.v, of_key);
    }
    t.out = poison_of(span(query_storage(shape), p.heads_q, p.dim_v, s.out) * bytes_of(p.dtype_q));
    if (p.wants_log_sum_exp) {
      t.log_sum_exp.resize(static_cast<size_t>(p.batch * p.heads_q * count(of_q)),
                           std::numeric_limits<float>::quiet_NaN());
    }
    return t;
  }
  Tensors tensors(LocalTensors& t) const {
    const Tensors all = data_.tensors();
    Tensors made;
    made.q = t.q.data();
    made.k = t.k.data();
    made.v = t.v.data();
    made.out = t.out.data();
    made.mask = all.mask;
    made.sinks = all.sinks;
    made.log_sum_exp = t.log_sum_exp.data();
    made.page_table = t.page_table.data();
    return made;
  }
  // Puts a rank's answer where the whole's belongs.
  void put(int32_t rank, const LocalTensors& t) {
    const Problem& p = whole();
    const LocalLayout& s = sharded_.layouts[static_cast<size_t>(rank)];
    const int64_t bytes = bytes_of(p.dtype_q), rows = sharded_.local_len_q(rank);
    each_row(sharded_.q[static_cast<size_t>(rank)], p.heads_q,
             [&](int64_t b, int64_t h, int64_t token, int64_t i) {
               for (int64_t d = 0; d < p.dim_v; ++d) {
                 std::memcpy(data_.out.data() + offset_of(p.stride_out, b, h, token, d) * bytes,
                             t.out.data() + offset_of(s.out, b, h, i, d) * bytes,
                             static_cast<size_t>(bytes));
               }
               if (!p.wants_log_sum_exp) return;
               reinterpret_cast<float*>(
                   data_.log_sum_exp.data())[(b * p.heads_q + h) * p.len_q + token] =
                   t.log_sum_exp[static_cast<size_t>((b * p.heads_q + h) * rows + i)];
             });
  }
  // Of one rank's rows alone, with those of the others taken for right.
  std::string difference_of(int32_t rank, const LocalTensors& t) {
    const Problem& p = whole();
    const Expected expected = expected_answer(p, data_.tensors());
    Expected mine;
    each_row(sharded_.q[static_cast<size_t>(rank)], p.heads_q,
             [&](int64_t b, int64_t h, int64_t token, int64_t) {
               const int64_t row = (b * p.heads_q + h) * p.len_q + token;
               const auto* out = expected.out.data() + row * p.dim_v;
               mine.rows.push_back(row);
               mine.out.insert(mine.out.end(), out, out + p.dim_v);
               mine.log_sum_exp.push_back(expected.log_sum_exp[static_cast<size_t>(row)]);
             });
    put(rank, t);
    return compare(data_, mine).message;
  }
  // Those of the rank's rows that are among `most_rows` of the whole's. Ranks that share this may
  // ask at once.
  SampledRows sampled(int32_t rank, int64_t most_rows) const {
    const Problem& p = whole();
    const Strides& to = sharded_.layouts[static_cast<size_t>(rank)].out;
    SampledRows sampled;
    std::vector<int64_t> rows;
    for (const int64_t row : sampled_rows(p.batch * p.heads_q, p.len_q, most_rows)) {
      const int64_t token = row % p.len_q, pair = row / p.len_q;
      int64_t before = 0;  // of the rank's tokens
      for (const TokenRange& range : sharded_.q[static_cast<size_t>(rank)]) {
        if (range.begin <= token && token < range.end) {
          const int64_t i = before + token - range.begin, bytes = bytes_of(p.dtype_q);
          const int64_t begin = offset_of(to, pair / p.heads_q, pair % p.heads_q, i, 0);
          sampled.rows.push_back({static_cast<size_t>(begin * bytes),
                                  static_cast<size_t>(((p.dim_v - 1) * to[3] + 1) * bytes)});
          rows.push_back(row);
        }
        before += range.end - range.begin;
      }
    }
    sampled.expected = expected_rows(p, data_.tensors(), rows);
    return sampled;
  }
  double relative_rms_of(int32_t rank, const LocalTensors& t, const SampledRows& sampled) const {
    const Problem& p = whole();
    const int64_t stride = sharded_.layouts[static_cast<size_t>(rank)].out[3];
    Errors errors;
    size_t i = 0;
    for (const SampledRows::Row& row : sampled.rows) {
      for (int64_t d = 0; d < p.dim_v; ++d) {
        const float have = load_element(t.out.data() + row.begin_bytes, p.dtype_q, d * stride);
        errors.add(have, sampled.expected.out[i++]);
      }
    }
    return errors.relative_rms();
  }
  void poison() { data_.poison_outputs(); }
  // The whole's, for a device that has everything.
  Tensors whole_tensors() const { return data_.tensors(); }
  std::vector<std::byte> out() const {
    return {data_.out.data(), data_.out.data() + data_.out.size()};
  }
  // Of every row, of an answer that out() was: empty where it is within both ones' rounding.
  std::string disagreement_with(const std::vector<std::byte>& other_out) const {
    return disagreement(data_, other_out);
  }
  // Empty: within the tolerance of the type.
  std::string difference() const {
    return compare(data_, expected_answer(whole(), data_.tensors())).message;
  }

 private:
  template <typename Visit>
  void each_row(const Tokens& tokens, int64_t heads, const Visit& visit) const {
    int64_t i = 0;
    for (const TokenRange& range : tokens) {
      for (int64_t token = range.begin; token < range.end; ++token, ++i) {
        for (int64_t b = 0; b < whole().batch; ++b) {
          for (int64_t h = 0; h < heads; ++h) visit(b, h, token, i);
        }
      }
    }
  }
  // The same where each row may be visited beside others.
  template <typename Visit>
  void each_row_at_once(const Tokens& tokens, int64_t heads, const Visit& visit) const {
    int64_t before = 0;
    for (const TokenRange& range : tokens) {
      const int64_t length = range.end - range.begin;
      for_each_row(whole().batch, heads, length, [&](RowIndex row) {
        visit(row.batch_idx, row.head, range.begin + row.idx, before + row.idx);
      });
      before += length;
    }
  }
  static Bytes poison_of(int64_t bytes) {
    Bytes made(static_cast<size_t>(bytes));
    fill_bytes(made.data(), made.size(), std::byte{0xff});
    return made;
  }
  static Input dense(Input input) {
    input.problem = with_dense_keys(input.problem);
    input.page_table.clear();
    return input;
  }
  // Entries whose pages hold no key that is there are no pages of the pool.
  std::vector<int32_t> page_table(int32_t rank) const {
    const Problem shape = local_problem(sharded_, rank);
    if (shape.key_layout != KeyLayout::kPaged) return {};
    std::vector<int32_t> pool(static_cast<size_t>(shape.pages));
    std::iota(pool.begin(), pool.end(), 0);
    std::shuffle(pool.begin(), pool.end(), std::mt19937_64(static_cast<uint64_t>(rank)));
    std::vector<int32_t> table(static_cast<size_t>(shape.batch * shape.stride_page_table), -1);
    each_row(sharded_.k[static_cast<size_t>(rank)], 1,
             [&](int64_t b, int64_t, int64_t token, int64_t i) {
               const KeyRange there = sequence_at(whole(), data_.tensors(), b).present;
               if (token < there.begin || token >= there.end) return;
               const auto entry =
                   static_cast<size_t>(b * shape.stride_page_table + i / shape.page_size);
               if (table[entry] >= 0) return;
               table[entry] = pool.back();
               pool.pop_back();
             });
    return table;
  }
  // Where a token lies: in which batch entry or page, and at which of its places. Batch below 0:
  // nowhere.
  struct At {
    int64_t batch_idx, index;
  };
  static int64_t span(const Storage& storage, int64_t heads, int64_t dim, const Strides& s) {
    if (storage.batch == 0 || storage.length == 0) return 0;
    return offset_of(s, storage.batch - 1, heads - 1, storage.length - 1, dim - 1) + 1;
  }
  template <typename Locate>
  Bytes cut(const GuardedTensor& from, Dtype dtype, const Strides& strides, const Tokens& tokens,
            int64_t heads, int64_t dim, const Storage& storage, const Strides& to,
            const Locate& locate) const {
    const int64_t bytes = bytes_of(dtype);
    Bytes made = poison_of(span(storage, heads, dim, to) * bytes);
    const int64_t at_once = strides[3] == 1 && to[3] == 1 ? dim : 1;
    each_row_at_once(tokens, heads, [&](int64_t b, int64_t h, int64_t token, int64_t i) {
      const At at = locate(b, i);
      if (at.batch_idx < 0) return;
      for (int64_t d = 0; d < dim; d += at_once) {
        std::memcpy(made.data() + offset_of(to, at.batch_idx, h, at.index, d) * bytes,
                    from.data() + offset_of(strides, b, h, token, d) * bytes,
                    static_cast<size_t>(at_once * bytes));
      }
    });
    return made;
  }

  HostTensors data_;
  ShardedProblem sharded_;
};

}  // namespace wh::sharded
