// cpu_unfused: for each query head, S = scale * Q K^T, softmax over rows, O = P V, with the whole
// score matrix of one head in the workspace. Few queries (decode) take all heads of a group at
// once: eight products of one row would each read K again.
//
// Roofline: the two products run at the CBLAS's rate; softmax reads and writes S once each way, so
// short dims are bound by memory (S is len_q * len_k * 4 bytes, 268 MB at 2048 x 32768).
#include <atomic>
#include <cmath>
#include <limits>

#include "core/array_mask.h"
#include "core/key_range.h"
#include "core/rounding.h"
#include "core/score_rules.h"
#include "cpu/common/partial.h"
#include "cpu/common/steps.h"
#include "cpu/unfused/gemm.h"
#include "cpu/unfused/unfused.h"
#include "plan/work.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/unfused/kernel.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep
#include <hwy/highway.h>

#include "cpu/common/tile-inl.h"
#include "cpu/common/vector_math-inl.h"
#include "cpu/cpu_facts.h"

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
  const float minus_infinity = -std::numeric_limits<float>::infinity();
  auto m_vector = hn::Set(f32, minus_infinity);
  const auto log2e = hn::Set(f32, kLog2E);
  int64_t j = 0;
  for (; j + lanes <= keys; j += lanes) {
    m_vector = hn::Max(m_vector, hn::LoadU(f32, s + j));
  }
  float m = hn::GetLane(hn::MaxOfLanes(f32, m_vector));
  for (; j < keys; ++j) m = std::fmax(m, s[j]);
  // Subtracted before it is multiplied: the largest score's exponent is then 0 whatever its size. A
  // multiply-add would subtract a rounded product from one that is not.
  const float shift = m == minus_infinity ? 0 : m;
  const auto shift_vector = hn::Set(f32, shift);
  auto sum = hn::Zero(f32);
  for (j = 0; j + lanes <= keys; j += lanes) {
    const auto x = hn::Mul(hn::Sub(hn::LoadU(f32, s + j), shift_vector), log2e);
    const auto weight = exp2_nonpositive(x);
    sum = hn::Add(sum, weight);
    hn::StoreU(weight, f32, s + j);
  }
  float l = hn::GetLane(hn::SumOfLanes(f32, sum));
  for (; j < keys; ++j) {
    s[j] = std::exp2((s[j] - shift) * kLog2E);
    l += s[j];
  }
  return {m * kLog2E, l};
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

// Query heads whose rows share one product.
int64_t heads_at_once(const Problem& p) {
  constexpr int64_t kMostRows = 64;
  return p.len_q * p.group() <= kMostRows ? p.group() : 1;
}

struct Workspace {
  float* q;  // [rows, dim_qk]; rows: len_q of each head at once
  float* k;  // [len_k, dim_qk]
  float* v;  // [len_k, dim_v]
  float* s;  // [rows, len_k]
  float* o;  // [rows, dim_v]
  float* m;  // [rows]
  float* l;  // [rows]

  Workspace(Carver& carver, const Problem& p) {
    const int64_t rows = p.len_q * heads_at_once(p);
    q = carver.take<float>(rows * p.dim_qk);
    k = carver.take<float>(p.len_k * p.dim_qk);
    v = carver.take<float>(p.len_k * p.dim_v);
    s = carver.take<float>(rows * p.len_k);
    o = carver.take<float>(rows * p.dim_v);
    m = carver.take<float>(rows);
    l = carver.take<float>(rows);
  }
};

// One product's heads: first_head and those that follow, row = head * len_q + query.
struct Heads {
  int64_t batch_idx, first_head, count;
  KeyRange present;
  bool v_is_finite;

  int64_t rows(const Problem& p) const { return count * p.len_q; }
  int64_t head(const Problem& p, int64_t row) const { return first_head + row / p.len_q; }
};

// An element of the score matrix in softmax, beside the multiply-adds of the products.
constexpr int64_t kWeighWork = 16;
constexpr int64_t kRowsPerItem = 16;

// Rows in parallel, handed out from a counter until the caller wants to stop.
template <typename Body>
void for_rows(const Launch& launch, int64_t rows, int64_t row_work, Body&& body) {
  std::atomic<int64_t> next{0};
  parallel(launch.executor, launch.config.workers, [&](int32_t) {
    Steps steps(launch.progress);
    for (int64_t begin = next.fetch_add(kRowsPerItem);
         begin < rows && !launch.progress.is_cancelled(); begin = next.fetch_add(kRowsPerItem)) {
      const int64_t end = std::min(begin + kRowsPerItem, rows);
      body(begin, end);
      steps.done((end - begin) * row_work);
    }
  });
}

// Rows from element `first` on.
bool widen_matrix(const Launch& launch, const void* from, Dtype dtype, int64_t first,
                  const Strides& stride, int64_t rows, int64_t dim, float* to) {
  std::atomic<bool> finite{true};
  for_rows(launch, rows, dim, [&](int64_t begin, int64_t end) {
    if (!HWY_DYNAMIC_DISPATCH(widen)(from, dtype, first + begin * stride[2], stride, end - begin,
                                     dim, to + begin * dim)) {
      finite = false;
    }
  });
  return finite;
}

// The most rows and columns of a piece of a product, by its shape alone.
struct Piece {
  int64_t rows, columns;
};

Piece gemm_piece(int64_t m, int64_t n, Transpose transpose_b) {
  // Each piece packs its share of a and b: under 2 % of the time from 128 rows on.
  constexpr int64_t kRows = 128;
  const int64_t columns = m > kRows ? n : (transpose_b == Transpose::kYes ? 2048 : 64);
  return {std::min(kRows, m), std::min(columns, n)};
}

// Hands out the pieces of a product until the caller wants to stop.
void parallel_gemm(const Launch& launch, int64_t m, int64_t n, int64_t k, float alpha,
                   GemmOperand a, GemmOperand b, Transpose transpose_b, float* c,
                   int64_t c_row_stride) {
  const Piece piece = gemm_piece(m, n, transpose_b);
  const int64_t column_blocks = divide_up(n, piece.columns);
  const int64_t blocks = divide_up(m, piece.rows) * column_blocks;
  std::atomic<int64_t> next{0};
  parallel(launch.executor, launch.config.workers, [&](int32_t) {
    Steps steps(launch.progress);
    for (int64_t i = next++; i < blocks && !launch.progress.is_cancelled(); i = next++) {
      const int64_t row = i / column_blocks * piece.rows;
      const int64_t column = i % column_blocks * piece.columns;
      const int64_t rows = std::min(piece.rows, m - row);
      const int64_t columns = std::min(piece.columns, n - column);
      const int64_t b_offset = transpose_b == Transpose::kYes ? column * b.row_stride : column;
      gemm(rows, columns, k, alpha, {a.data + row * a.row_stride, a.row_stride},
           {b.data + b_offset, b.row_stride}, transpose_b, c + row * c_row_stride + column,
           c_row_stride);
      steps.done(rows * columns * k);
    }
  });
}

// Masks and normalises one row of scores; weights of hidden keys become 0.
void weigh_row(const Problem& p, const Tensors& t, const Heads& heads, int64_t row,
               const Workspace& w) {
  const int64_t keys = heads.present.size();
  const int64_t query = row % p.len_q;
  float* s = w.s + row * keys;
  const KeyRange visible = visible_keys(p, heads.present, query);
  const int64_t begin = std::clamp<int64_t>(visible.begin - heads.present.begin, 0, keys);
  const int64_t end = std::clamp<int64_t>(visible.end - heads.present.begin, begin, keys);
  for (int64_t j = 0; j < begin; ++j) s[j] = 0;
  for (int64_t j = end; j < keys; ++j) s[j] = 0;
  if (p.softcap > 0) HWY_DYNAMIC_DISPATCH(softcap_row)(s + begin, end - begin, p.softcap);
  if (p.mask != MaskKind::kNone) {
    for (int64_t j = begin; j < end; ++j) {
      const float bias =
          mask_bias(p, t.mask, heads.batch_idx, heads.head(p, row), query, heads.present.begin + j);
      s[j] = bias == -kInfinity ? -kInfinity : s[j] + bias;
    }
  }
  const auto sums = HWY_DYNAMIC_DISPATCH(softmax_row)(s + begin, end - begin);
  w.m[row] = sums.m;
  w.l[row] = sums.l;
}

// V holds an infinity or NaN: a weight of zero would not hide it, so hidden keys are skipped.
void add_values_one_by_one(const Problem& p, const Tensors& t, const Heads& heads, int64_t row,
                           const Workspace& w) {
  const int64_t keys = heads.present.size();
  const int64_t query = row % p.len_q;
  const KeyRange visible = visible_keys(p, heads.present, query);
  float* o = w.o + row * p.dim_v;
  for (int64_t d = 0; d < p.dim_v; ++d) o[d] = 0;
  for (int64_t key = visible.begin; key < visible.end; ++key) {
    if (mask_bias(p, t.mask, heads.batch_idx, heads.head(p, row), query, key) == -kInfinity) {
      continue;
    }
    const int64_t j = key - heads.present.begin;
    for (int64_t d = 0; d < p.dim_v; ++d) {
      o[d] += w.s[row * keys + j] * w.v[j * p.dim_v + d];
    }
  }
}

void run_heads(const Launch& launch, const Heads& heads, const Workspace& w) {
  const Problem& p = launch.problem;
  const Tensors& t = launch.tensors;
  const int64_t keys = heads.present.size();
  const int64_t rows = heads.rows(p);
  for (int64_t h = 0; h < heads.count; ++h) {
    const int64_t first = heads.batch_idx * p.stride_q[0] + (heads.first_head + h) * p.stride_q[1];
    widen_matrix(launch, t.q, p.dtype_q, first, p.stride_q, p.len_q, p.dim_qk,
                 w.q + h * p.len_q * p.dim_qk);
  }
  if (keys > 0) {
    parallel_gemm(launch, rows, keys, p.dim_qk, p.scale, {w.q, p.dim_qk}, {w.k, p.dim_qk},
                  Transpose::kYes, w.s, keys);
  }
  for_rows(launch, rows, keys * kWeighWork, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) weigh_row(p, t, heads, row, w);
  });
  const bool is_product = keys > 0 && heads.v_is_finite;
  if (is_product) {
    parallel_gemm(launch, rows, p.dim_v, keys, 1.0f, {w.s, keys}, {w.v, p.dim_v}, Transpose::kNo,
                  w.o, p.dim_v);
  }
  const int64_t row_work = p.dim_v * (is_product ? 1 : keys + 1);
  for_rows(launch, rows, row_work, [&](int64_t begin, int64_t end) {
    const int64_t group = p.group();
    launch.progress.writing_out();
    for (int64_t row = begin; row < end; ++row) {
      if (!is_product) add_values_one_by_one(p, t, heads, row, w);
      const int64_t head = heads.head(p, row);
      const RowId id{sequence_at(p, t, heads.batch_idx), head / group,
                     row % p.len_q * group + head % group};
      store_row(p, t, id, w.m[row], w.l[row], w.o + row * p.dim_v);
    }
  });
}

// What progress counts, in multiply-adds: widening, the products, softmax and the rows stored.
int64_t work(const Problem& p, const Tensors& t) {
  const int64_t dims = p.dim_qk + p.dim_v;
  int64_t work = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t keys = present_keys(p, t, b).size();
    work += p.heads_kv * keys * dims + p.heads_q * p.len_q * (dims + keys * (dims + kWeighWork));
  }
  return work;
}

Status run(const Launch& launch) {
  const Problem& p = launch.problem;
  const Tensors& t = launch.tensors;
  Carver carver(t.workspace);
  const Workspace w(carver, p);
  const OneGemmThread one_thread;
  const int64_t at_once = heads_at_once(p);
  launch.progress.start(work(p, t));
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
      for (int64_t g = 0; g < p.group(); g += at_once) {
        run_heads(launch, {b, h * p.group() + g, at_once, present, finite}, w);
        // Small heads have no step that is worth a look.
        if (!launch.progress.step_done(0)) return launch.progress.finish();
      }
    }
  }
  return launch.progress.finish();
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
  config.workers = cpu_facts(query).threads(query.limits.threads);
  return config;
}

std::string variant(const Query&, const Config&) {
  return unfused_has_cblas() ? "CBLAS sgemm" : "own product, no CBLAS in this build";
}

size_t workspace_bytes(const Problem& p, const Config&) {
  Carver carver(nullptr);
  Workspace(carver, p);
  return carver.bytes();
}

constexpr double kScoreBytes = 4 * 4;  // written, read, written, read

// A core's, in the products.
double product_gflops(const Query& query) {
  const Problem& p = query.problem;
  // A product of few rows reuses too little of what it packs: half the rate at 16.
  const auto rows_at_once = static_cast<double>(p.len_q * heads_at_once(p));
  const double share = cpu_facts(query).has_cblas ? 0.6 * rows_at_once / (rows_at_once + 16) : 0.05;
  return cpu_facts(query).gflops_per_core * std::max(share, 1e-3);
}

double estimate_us(const Query& query, const Config& config) {
  const Problem& p = query.problem;
  const double threads = std::min(config.workers, cpu_facts(query).cores);
  const double pairs = static_cast<double>(p.batch * p.heads_q) * static_cast<double>(p.len_q) *
                       static_cast<double>(p.len_k);
  const double flops = pairs * 2 * static_cast<double>(p.dim_qk + p.dim_v);
  const double flops_us = flops / (product_gflops(query) * threads * 1e3);
  const double score_bytes = pairs * kScoreBytes;
  // K and V are read, written as f32 and read again by the product.
  const double widen_bytes = kv_bytes(p) * (1 + 8.0 / static_cast<double>(dtype_bytes(p.dtype_kv)));
  return flops_us + (score_bytes + widen_bytes) / (cpu_facts(query).read_gbytes_per_s * 1e3) +
         static_cast<double>(std::max<int64_t>(1, p.batch) * p.heads_q) * 3;
}

// The larger product's piece, or the rows of softmax that a thread takes at once.
double step_us(const Query& query, const Config& config) {
  const Problem& p = query.problem;
  const int64_t rows = p.len_q * heads_at_once(p);
  const auto flops = [](Piece piece, int64_t k) {
    return 2 * static_cast<double>(piece.rows * piece.columns) * static_cast<double>(k);
  };
  const double most_flops = std::max(flops(gemm_piece(rows, p.len_k, Transpose::kYes), p.dim_qk),
                                     flops(gemm_piece(rows, p.dim_v, Transpose::kNo), p.len_k));
  const double threads = config.workers, cores = cpu_facts(query).cores;
  const double score_bytes = static_cast<double>(kRowsPerItem * p.len_k) * kScoreBytes;
  const double softmax_us =
      score_bytes * std::min(threads, cores) / (cpu_facts(query).read_gbytes_per_s * 1e3);
  return std::max(most_flops / (product_gflops(query) * 1e3), softmax_us) *
         std::max(1.0, threads / cores);
}

}  // namespace

bool unfused_has_cblas() { return gemm_uses_cblas(); }

const Kernel kUnfused{.name = "cpu_unfused",
                      .role = Role::kBaseline,
                      .summary = "matmul, softmax, matmul, head by head: the baseline",
                      .refusal = refusal,
                      .configure = configure,
                      .variant = variant,
                      .workspace_bytes = workspace_bytes,
                      .estimate_us = estimate_us,
                      .run = run,
                      .step_us = step_us};

}  // namespace wh::cpu
#endif
