// Sharded problems of every kind, at random.
#pragma once

#include <array>
#include <random>
#include <utility>
#include <vector>

#include "verify/sharded_data.h"

namespace wh::sharded {

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

enum class CaseDims : uint8_t { kSmall, kOfModels };
enum class CaseKeys : uint8_t { kDense, kPaged };

// A problem of every kind of mask, split in one of the usual ways or at random.
inline ShardedData random_case(int32_t ranks, uint64_t seed, Device device = Device::kCpu,
                               CaseDims dims = CaseDims::kSmall, CaseKeys keys = CaseKeys::kDense) {
  std::mt19937_64 random(seed);
  const auto pick = [&](auto... values) {
    const std::common_type_t<decltype(values)...> list[] = {values...};
    return list[random() % std::size(list)];
  };
  const auto chance = [&](unsigned percent) { return random() % 100 < percent; };
  Input input;
  input.seed = seed;
  Problem& p = input.problem;
  p.device = device;
  p.dtype_q = pick(Dtype::kF32, Dtype::kF16, Dtype::kBf16);
  p.dtype_kv = p.dtype_q;
  p.batch = pick(1, 1, 2, 3);
  p.heads_kv = pick(1, 2, 4);
  p.heads_q = p.heads_kv * pick(1, 2, 4);
  p.dim_qk = pick(16, 40, 64);
  p.dim_v = pick(16, 24, 64);
  if (dims == CaseDims::kOfModels) {
    const std::array<int64_t, 2> of_models[] = {{64, 64},   {128, 128}, {192, 128},
                                                {256, 256}, {512, 512}, {576, 512}};
    const auto& [qk, v] = of_models[random() % std::size(of_models)];
    p.dim_qk = qk;
    p.dim_v = v;
  }
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
  p.has_key_lengths = chance(30) || keys == CaseKeys::kPaged;
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
  Problem shared = p;
  if (keys == CaseKeys::kPaged) {
    shared.key_layout = KeyLayout::kPaged;
    shared.page_size = pick(1, 5, 16, 64);
  }
  ShardedProblem s = shard(shared, split(p.len_q), split(p.len_k));
  s.key_lengths = input.key_lengths;
  s.key_starts = input.key_starts;
  for (int32_t r = 0; r < ranks; ++r) {
    if (!chance(50)) continue;  // [batch, length, heads, dim]
    LocalLayout& layout = s.layouts[static_cast<size_t>(r)];
    const auto length_first = [](int64_t heads, int64_t length, int64_t dim) {
      return Strides{length * heads * dim, dim, heads * dim, 1};
    };
    layout.q = length_first(p.heads_q, s.local_len_q(r), p.dim_qk);
    layout.out = length_first(p.heads_q, s.local_len_q(r), p.dim_v);
    // Pages have their tokens first anyway.
    const bool is_paged = keys == CaseKeys::kPaged;
    const auto of_keys = [&](int64_t dim) {
      return is_paged ? dense_strides(p.heads_kv, shared.page_size, dim)
                      : length_first(p.heads_kv, s.local_len_k(r), dim);
    };
    layout.k = of_keys(p.dim_qk);
    layout.v = p.values_in_keys ? layout.k : of_keys(p.dim_v);
  }
  return {input, std::move(s)};
}

// Causal, bf16.
inline Problem causal(int64_t heads_q, int64_t heads_kv, int64_t dim, int64_t len_q,
                      int64_t len_k) {
  Problem p;
  p.dtype_q = p.dtype_kv = Dtype::kBf16;
  p.heads_q = heads_q;
  p.heads_kv = heads_kv;
  p.dim_qk = p.dim_v = dim;
  p.len_q = len_q;
  p.len_k = len_k;
  p.causal = Causal::kBottomRight;
  set_dense(p);
  return p;
}

}  // namespace wh::sharded
