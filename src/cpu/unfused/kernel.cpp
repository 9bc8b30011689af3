// cpu_unfused: for each query head, S = scale * Q K^T, softmax over rows, O = P V, with the whole
// score matrix of one head in the workspace.
//
// Roofline: the two products run at the CBLAS's rate; softmax reads and writes S once each way, so
// short dims are bound by memory (S is len_q * len_k * 4 bytes, 268 MB at 2048 x 32768).
#include <atomic>
#include <cmath>
#include <limits>

#include "core/array_mask.h"
#include "core/key_range.h"
#include "cpu/partial.h"
#include "cpu/unfused/gemm.h"
#include "cpu/unfused/unfused.h"
#include "plan/work.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/unfused/kernel.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep
#include <hwy/highway.h>

#include "cpu/tile-inl.h"
#include "cpu/vector_math-inl.h"

#ifndef WH_CPU_UNFUSED_ROW_SUMS
#define WH_CPU_UNFUSED_ROW_SUMS
namespace wh::cpu {
// Largest score and sum of weights of one row, whose scores become weights. Base 2: see partial.h.
struct RowSums {
  float m, l;
};
}  // namespace wh::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

bool widen(const void* from, Dtype dtype, int64_t first, const Strides& stride, int64_t rows,
           int64_t dim, float* to) {
  return widen_rows(from, dtype, first, stride, rows, dim, dim, to);
}

RowSums softmax_row(float* s, int64_t keys) {
  const F32 f32;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(f32));
  constexpr float kLog2e = 1.44269504f;
  const float minus_infinity = -std::numeric_limits<float>::infinity();
  auto m_vector = hn::Set(f32, minus_infinity);
  const auto log2e = hn::Set(f32, kLog2e);
  int64_t j = 0;
  for (; j + lanes <= keys; j += lanes) {
    m_vector = hn::Max(m_vector, hn::LoadU(f32, s + j));
  }
  float m = hn::GetLane(hn::MaxOfLanes(f32, m_vector));
  for (; j < keys; ++j) m = std::fmax(m, s[j]);
  m *= kLog2e;
  const float shift = m == minus_infinity ? 0 : m;
  const auto shift_vector = hn::Set(f32, shift);
  auto sum = hn::Zero(f32);
  for (j = 0; j + lanes <= keys; j += lanes) {
    const auto x = hn::MulSub(hn::LoadU(f32, s + j), log2e, shift_vector);
    const auto weight = exp2_nonpositive(x);
    sum = hn::Add(sum, weight);
    hn::StoreU(weight, f32, s + j);
  }
  float l = hn::GetLane(hn::SumOfLanes(f32, sum));
  for (; j < keys; ++j) {
    s[j] = std::exp2(s[j] * kLog2e - shift);
    l += s[j];
  }
  return {m, l};
}

void softcap_row(float* s, int64_t keys, float softcap) {
  const F32 f32;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(f32));
  const auto cap = hn::Set(f32, softcap);
  const auto inverse = hn::Set(f32, 1 / softcap);
  int64_t j = 0;
  for (; j + lanes <= keys; j += lanes) {
    hn::StoreU(hn::Mul(cap, tanh_vector(hn::Mul(hn::LoadU(f32, s + j), inverse))), f32, s + j);
  }
  for (; j < keys; ++j) s[j] = softcap * std::tanh(s[j] / softcap);
}

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wh::cpu {
HWY_EXPORT(widen);
HWY_EXPORT(softmax_row);
HWY_EXPORT(softcap_row);

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Workspace {
  float* q;  // [len_q, dim_qk]
  float* k;  // [len_k, dim_qk]
  float* v;  // [len_k, dim_v]
  float* s;  // [len_q, len_k]
  float* o;  // [len_q, dim_v]
  float* m;  // [len_q]
  float* l;  // [len_q]

  Workspace(Carver& carver, const Problem& p) {
    q = carver.take<float>(p.len_q * p.dim_qk);
    k = carver.take<float>(p.len_k * p.dim_qk);
    v = carver.take<float>(p.len_k * p.dim_v);
    s = carver.take<float>(p.len_q * p.len_k);
    o = carver.take<float>(p.len_q * p.dim_v);
    m = carver.take<float>(p.len_q);
    l = carver.take<float>(p.len_q);
  }
};

struct Head {
  int64_t batch_idx, head_q;
  KeyRange present;
  bool v_is_finite;
};

// Rows in parallel, handed out from a counter.
template <typename Body>
void for_rows(const Launch& launch, int64_t rows, Body&& body) {
  constexpr int64_t kRowsPerItem = 16;
  std::atomic<int64_t> next{0};
  parallel(launch.executor, launch.config.threads, [&](int32_t) {
    for (int64_t begin = next.fetch_add(kRowsPerItem); begin < rows;
         begin = next.fetch_add(kRowsPerItem)) {
      body(begin, std::min(begin + kRowsPerItem, rows));
    }
  });
}

// Rows from element `first` on.
bool widen_matrix(const Launch& launch, const void* from, Dtype dtype, int64_t first,
                  const Strides& stride, int64_t rows, int64_t dim, float* to) {
  std::atomic<bool> finite{true};
  for_rows(launch, rows, [&](int64_t begin, int64_t end) {
    if (!HWY_DYNAMIC_DISPATCH(widen)(from, dtype, first + begin * stride[2], stride, end - begin,
                                     dim, to + begin * dim)) {
      finite = false;
    }
  });
  return finite;
}

// Masks and normalises one row of scores; weights of hidden keys become 0.
void weigh_row(const Problem& p, const Tensors& t, const Head& head, int64_t query,
               const Workspace& w) {
  const int64_t keys = head.present.size();
  float* s = w.s + query * keys;
  const KeyRange visible = visible_keys(p, head.present, query);
  const int64_t begin = std::clamp<int64_t>(visible.begin - head.present.begin, 0, keys);
  const int64_t end = std::clamp<int64_t>(visible.end - head.present.begin, begin, keys);
  for (int64_t j = 0; j < begin; ++j) s[j] = 0;
  for (int64_t j = end; j < keys; ++j) s[j] = 0;
  if (p.softcap > 0) HWY_DYNAMIC_DISPATCH(softcap_row)(s + begin, end - begin, p.softcap);
  if (p.mask != MaskKind::kNone) {
    for (int64_t j = begin; j < end; ++j) {
      const float bias =
          mask_bias(p, t.mask, head.batch_idx, head.head_q, query, head.present.begin + j);
      s[j] = bias == -kInfinity ? -kInfinity : s[j] + bias;
    }
  }
  const auto sums = HWY_DYNAMIC_DISPATCH(softmax_row)(s + begin, end - begin);
  w.m[query] = sums.m;
  w.l[query] = sums.l;
}

// V holds an infinity or NaN: a weight of zero would not hide it, so hidden keys are skipped.
void add_values_one_by_one(const Problem& p, const Tensors& t, const Head& head, int64_t query,
                           const Workspace& w) {
  const int64_t keys = head.present.size();
  const KeyRange visible = visible_keys(p, head.present, query);
  float* o = w.o + query * p.dim_v;
  for (int64_t d = 0; d < p.dim_v; ++d) o[d] = 0;
  for (int64_t key = visible.begin; key < visible.end; ++key) {
    if (mask_bias(p, t.mask, head.batch_idx, head.head_q, query, key) == -kInfinity) continue;
    const int64_t j = key - head.present.begin;
    for (int64_t d = 0; d < p.dim_v; ++d) {
      o[d] += w.s[query * keys + j] * w.v[j * p.dim_v + d];
    }
  }
}

void run_head(const Launch& launch, const Head& head, const Workspace& w) {
  const Problem& p = launch.problem;
  const Tensors& t = launch.tensors;
  const int64_t keys = head.present.size();
  widen_matrix(launch, t.q, p.dtype_q, head.batch_idx * p.stride_q[0] + head.head_q * p.stride_q[1],
               p.stride_q, p.len_q, p.dim_qk, w.q);
  if (keys > 0) {
    gemm(p.len_q, keys, p.dim_qk, p.scale, {w.q, p.dim_qk}, {w.k, p.dim_qk}, Transpose::kYes, w.s,
         keys);
  }
  for_rows(launch, p.len_q, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) weigh_row(p, t, head, i, w);
  });
  if (keys > 0 && head.v_is_finite) {
    gemm(p.len_q, p.dim_v, keys, 1.0f, {w.s, keys}, {w.v, p.dim_v}, Transpose::kNo, w.o, p.dim_v);
  }
  for_rows(launch, p.len_q, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (keys == 0 || !head.v_is_finite) add_values_one_by_one(p, t, head, i, w);
      const int64_t group = p.group();
      const RowId id{head.batch_idx, head.head_q / group, i * group + head.head_q % group};
      store_row(p, t, id, w.m[i], w.l[i], w.o + i * p.dim_v);
    }
  });
}

Status run(const Launch& launch) {
  const Problem& p = launch.problem;
  const Tensors& t = launch.tensors;
  Carver carver(t.workspace);
  const Workspace w(carver, p);
  const GemmThreads threads(launch.config.threads);
  launch.progress.start(p.batch * p.heads_q);
  for (int64_t b = 0; b < p.batch; ++b) {
    KeyRange present = present_keys(p, t, b);
    present.begin = std::min(present.begin, present.end);
    for (int64_t h = 0; h < p.heads_kv; ++h) {
      const auto first = [&](const Strides& stride) {
        return b * stride[0] + h * stride[1] + present.begin * stride[2];
      };
      widen_matrix(launch, t.k, p.dtype_kv, first(p.stride_k), p.stride_k, present.size(), p.dim_qk,
                   w.k);
      const bool finite = widen_matrix(launch, t.v, p.dtype_kv, first(p.stride_v), p.stride_v,
                                       present.size(), p.dim_v, w.v);
      for (int64_t g = 0; g < p.group(); ++g) {
        run_head(launch, {b, h * p.group() + g, present, finite}, w);
        if (!launch.progress.step_done()) return launch.progress.status("partly written");
      }
    }
  }
  return {};
}

std::optional<std::string> refusal(const Query& query) {
  const Problem& p = query.problem;
  if (static_cast<double>(p.len_q) * static_cast<double>(p.len_k) > 0x1p56) {
    return "the score matrix of one head has more elements than can be addressed";
  }
  return std::nullopt;
}

Config configure(const Query& query) {
  Config config;
  config.variant = unfused_has_cblas() ? "CBLAS sgemm" : "own product, no CBLAS in this build";
  config.threads = query.cpu.threads(query.limits.threads);
  return config;
}

size_t workspace_bytes(const Problem& p, const Config&) {
  Carver carver(nullptr);
  Workspace(carver, p);
  return carver.used_bytes();
}

double estimate_us(const Query& query, const Config& config) {
  const Problem& p = query.problem;
  const double threads = std::min(config.threads, query.cpu.cores);
  const double pairs = static_cast<double>(p.batch * p.heads_q) * static_cast<double>(p.len_q) *
                       static_cast<double>(p.len_k);
  const double share = query.cpu.has_cblas ? 0.55 : 0.05;
  const double flops = pairs * 2 * static_cast<double>(p.dim_qk + p.dim_v);
  const double flops_us = flops / (query.cpu.gflops_per_core * threads * share * 1e3);
  const double score_bytes = pairs * 4 * 4;  // written, read, written, read
  return flops_us + score_bytes / (query.cpu.read_gbytes_per_s * 1e3) +
         static_cast<double>(p.batch * p.heads_q) * 10;
}

}  // namespace

bool unfused_has_cblas() { return gemm_uses_cblas(); }

const Kernel kUnfused{"cpu_unfused",
                      Device::kCpu,
                      false,
                      "matmul, softmax, matmul, head by head: the baseline",
                      refusal,
                      configure,
                      workspace_bytes,
                      estimate_us,
                      run,
                      [](const Query& query, const Config& config) {
                        const int64_t heads = query.problem.batch * query.problem.heads_q;
                        return estimate_us(query, config) /
                               static_cast<double>(std::max<int64_t>(1, heads));
                      }};

}  // namespace wh::cpu
#endif
