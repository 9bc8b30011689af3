// A sharded problem with random tensors on the host: what each rank holds, and the whole's answer.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/element.h"
#include "parallel/plan.h"
#include "verify/answer.h"
#include "verify/elements.h"
#include "verify/host_tensors.h"

namespace wh::sharded {

// One rank's tensors. Gaps and what nobody may read hold NaN bits, as in the whole's.
struct LocalTensors {
  std::vector<std::byte> q, k, v, out;
  std::vector<float> log_sum_exp;
};

class ShardedCase {
 public:
  ShardedCase(const Input& input, ShardedProblem sharded)
      : data_(input), sharded_(std::move(sharded)) {}

  const ShardedProblem& problem() const { return sharded_; }
  const Problem& whole() const { return data_.problem; }

  LocalTensors local(int32_t rank) const {
    const Problem& p = whole();
    const LocalStrides& s = sharded_.strides[static_cast<size_t>(rank)];
    LocalTensors t;
    const Tokens& of_q = sharded_.q[static_cast<size_t>(rank)];
    const Tokens& of_k = sharded_.k[static_cast<size_t>(rank)];
    t.q = cut(data_.q, p.dtype_q, p.stride_q, of_q, p.heads_q, p.dim_qk, s.q);
    t.k = cut(data_.k, p.dtype_kv, p.stride_k, of_k, p.heads_kv, p.dim_qk, s.k);
    if (!p.values_in_keys) {
      t.v = cut(data_.v, p.dtype_kv, p.stride_v, of_k, p.heads_kv, p.dim_v, s.v);
    }
    t.out.resize(static_cast<size_t>(span(of_q, p.heads_q, p.dim_v, s.out) * bytes_of(p.dtype_q)),
                 std::byte{0xff});
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
    return made;
  }
  // Puts a rank's answer where the whole's belongs.
  void put(int32_t rank, const LocalTensors& t) {
    const Problem& p = whole();
    const LocalStrides& s = sharded_.strides[static_cast<size_t>(rank)];
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
  void poison() { data_.poison_outputs(); }
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
  int64_t span(const Tokens& tokens, int64_t heads, int64_t dim, const Strides& s) const {
    if (whole().batch == 0 || count(tokens) == 0) return 0;
    return offset_of(s, whole().batch - 1, heads - 1, count(tokens) - 1, dim - 1) + 1;
  }
  std::vector<std::byte> cut(const GuardedTensor& from, Dtype dtype, const Strides& strides,
                             const Tokens& tokens, int64_t heads, int64_t dim,
                             const Strides& to) const {
    const int64_t bytes = bytes_of(dtype);
    std::vector<std::byte> made(static_cast<size_t>(span(tokens, heads, dim, to) * bytes),
                                std::byte{0xff});
    each_row(tokens, heads, [&](int64_t b, int64_t h, int64_t token, int64_t i) {
      for (int64_t d = 0; d < dim; ++d) {
        std::memcpy(made.data() + offset_of(to, b, h, i, d) * bytes,
                    from.data() + offset_of(strides, b, h, token, d) * bytes,
                    static_cast<size_t>(bytes));
      }
    });
    return made;
  }

  HostTensors data_;
  ShardedProblem sharded_;
};

// Random tokens for each rank, in ranges of any length, which may leave some without any.
inline Sharding random_sharding(int64_t length, int32_t ranks, std::mt19937_64& random) {
  Sharding sharding(static_cast<size_t>(ranks));
  for (int64_t begin = 0; begin < length;) {
    const auto most = static_cast<uint64_t>(length - begin);
    const auto size = static_cast<int64_t>(1 + random() % std::min<uint64_t>(most, 60));
    sharding[random() % static_cast<uint64_t>(ranks)].push_back({begin, begin + size});
    begin += size;
  }
  return sharding;
}

// A problem of every kind of mask, split in one of the usual ways or at random.
inline ShardedCase random_case(int32_t ranks, uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto pick = [&](auto... values) {
    const std::common_type_t<decltype(values)...> list[] = {values...};
    return list[random() % std::size(list)];
  };
  const auto chance = [&](unsigned percent) { return random() % 100 < percent; };
  Input input;
  input.seed = seed;
  Problem& p = input.problem;
  p.dtype_q = pick(Dtype::kF32, Dtype::kF16, Dtype::kBf16);
  p.dtype_kv = p.dtype_q;
  p.batch = pick(1, 1, 2, 3);
  p.heads_kv = pick(1, 2, 4);
  p.heads_q = p.heads_kv * pick(1, 2, 4);
  p.dim_qk = pick(16, 40, 64);
  p.dim_v = pick(16, 24, 64);
  p.len_k = pick(1, 7, 64, 130, 201);
  p.len_q = chance(60) ? p.len_k : pick(0, 1, 3, 50, 150);
  p.causal = pick(Causal::kNone, Causal::kBottomRight, Causal::kBottomRight, Causal::kTopLeft);
  if (chance(40)) p.window_left = static_cast<int64_t>(random() % 80);
  if (chance(25)) p.window_right = static_cast<int64_t>(random() % 80);
  if (chance(20)) p.softcap = 5;
  p.has_sinks = chance(30);
  p.wants_log_sum_exp = chance(60);
  if (chance(15) && p.dim_v <= p.dim_qk) p.values_in_keys = true;
  set_dense(p);
  if (chance(40)) {
    p.mask = pick(MaskKind::kBoolean, MaskKind::kAdditiveF32, MaskKind::kAdditiveQ);
    p.stride_mask = dense_strides(p.heads_q, p.len_q, p.len_k);
    if (chance(50)) p.stride_mask[0] = 0;
    if (chance(50)) p.stride_mask[1] = 0;
    // Rows that finite biases of the lowest size hide whole are means of V, of which a log-sum-exp
    // in f32 does not tell over how many keys: docs/parallel.md. A boolean mask hides whole rows
    // too.
    input.mask_pattern = p.mask == MaskKind::kBoolean
                             ? pick(MaskPattern::kRandom, MaskPattern::kWholeRows)
                             : MaskPattern::kRandom;
  }
  p.has_key_lengths = chance(30);
  p.has_key_starts = chance(20);
  for (int64_t b = 0; b < p.batch; ++b) {
    const auto most = static_cast<uint64_t>(p.len_k) + 1;
    if (p.has_key_lengths) input.key_lengths.push_back(static_cast<int32_t>(random() % most));
    if (p.has_key_starts) input.key_starts.push_back(static_cast<int32_t>(random() % most));
  }
  const auto split = [&](int64_t length) {
    const auto way = pick(0, 1, 2);
    return way == 0   ? contiguous(length, ranks)
           : way == 1 ? zigzag(length, ranks)
                      : random_sharding(length, ranks, random);
  };
  ShardedProblem s = shard(p, split(p.len_q), split(p.len_k));
  s.key_lengths = input.key_lengths;
  s.key_starts = input.key_starts;
  for (int32_t r = 0; r < ranks; ++r) {
    if (!chance(50)) continue;  // [batch, length, heads, dim]
    LocalStrides& strides = s.strides[static_cast<size_t>(r)];
    const auto length_first = [](int64_t heads, int64_t length, int64_t dim) {
      return Strides{length * heads * dim, dim, heads * dim, 1};
    };
    strides.q = length_first(p.heads_q, s.local_len_q(r), p.dim_qk);
    strides.k = length_first(p.heads_kv, s.local_len_k(r), p.dim_qk);
    strides.v = p.values_in_keys ? strides.k : length_first(p.heads_kv, s.local_len_k(r), p.dim_v);
    strides.out = length_first(p.heads_q, s.local_len_q(r), p.dim_v);
  }
  return {input, std::move(s)};
}

}  // namespace wh::sharded
