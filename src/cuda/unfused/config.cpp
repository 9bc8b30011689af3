#include "cuda/unfused/config.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/carver.h"
#include "core/rounding.h"
#include "cuda/combine/combine.h"
#include "cuda/common/attention_args.h"
#include "cuda/common/steps.h"
#include "cuda/cuda_facts.h"
#include "cuda/unfused/cublas_lt.h"
#include "cuda/unfused/kernel.h"
#include "plan/work.h"

namespace wh::cuda {
namespace {

constexpr int64_t kScoreBytesAtOnce = int64_t{256} << 20;

std::optional<std::string> refusal(const Query& query) {
  const Problem& p = query.problem;
  if (const std::string reason = cublas_lt_unavailable(); !reason.empty()) return reason;
  if (p.dtype_q != p.dtype_kv) return "q and k have different types; the products take one";
  if (least_splits(p) > 1) return kWritesTypeOfQ;
  if (!fits_int32(p)) {
    return fmt::format("a length or batch * heads_q is above {}", kMaxExtent);
  }
  if (static_cast<double>(p.len_q) * static_cast<double>(p.len_k) > 0x1p40) {
    return "the score matrix of one head has more than 2^40 elements";
  }
  return std::nullopt;
}

size_t workspace_bytes(const Problem& p, const Config& config) {
  return UnfusedWorkspace(nullptr, UnfusedTypes(p, config).packed, UnfusedShape(p)).bytes;
}

// Six launches a pass, products at 70 % of the tensor cores' rate (f32: of 1/16 of it), scores
// written and read twice, everything packed once.
double estimate_us(const Query& query, const Config& config) {
  const Problem& p = query.problem;
  const UnfusedShape shape(p);
  const bool is_f32 = UnfusedTypes(p, config).packed == Dtype::kF32;
  const double pairs =
      static_cast<double>(shape.items * shape.rows) * static_cast<double>(shape.keys);
  const double flops = pairs * 2 * static_cast<double>(shape.columns_qk + shape.columns_v);
  const double rate = cuda_facts(query).tensor_tflops * (is_f32 ? 0.045 : 0.6);
  const double bytes_each = is_f32 ? 16 : 12;
  const double bytes = pairs * bytes_each + 2 * kv_bytes(p) * static_cast<double>(p.group()) /
                                                static_cast<double>(shape.heads);
  return flops / (std::max(1.0, rate) * 1e6) +
         bytes / (std::max(1.0, cuda_facts(query).read_gbytes_per_s) * 1e3) +
         static_cast<double>(shape.passes()) * 20;
}

TileWaves waves_of(const Problem& p, double call_us) {
  const int64_t passes = std::max<int64_t>(1, UnfusedShape(p).passes());
  return {passes, 1, call_us / static_cast<double>(passes)};
}

Config configure(const Query& query) {
  const Problem& p = query.problem;
  const bool is_f32 = p.dtype_q == Dtype::kF32 || query.limits.precision == Precision::kHigh;
  Config config;
  config.arithmetic = is_f32 ? Arithmetic::kF32 : arithmetic_of(p.dtype_q);
  if (query.limits.longest_step_us > 0) {
    const double call_us = estimate_us(query, config);
    config.step_tiles = choose_step_tiles(query, waves_of(p, call_us), call_us);
  }
  return config;
}

std::string variant(const Query&, const Config& config) {
  return config.arithmetic == Arithmetic::kF32 ? "cuBLASLt f32" : "cuBLASLt tensor cores";
}

double step_us(const Query& query, const Config& config) {
  const double call_us = estimate_us(query, config);
  return step_us_of(waves_of(query.problem, call_us), config.step_tiles, call_us);
}

}  // namespace

UnfusedShape::UnfusedShape(const Problem& p) {
  // 8 elements of 16 bits are the 16 bytes that tensor cores want rows aligned to.
  columns_qk = round_up(p.dim_qk, 8);
  columns_v = round_up(p.dim_v, 8);
  keys = round_up(std::max<int64_t>(1, p.len_k), 8);
  const int64_t group_rows = p.group() * p.len_q;
  heads = group_rows * keys * 4 <= kScoreBytesAtOnce ? p.group() : 1;
  rows = std::max<int64_t>(1, heads * p.len_q);
  items = p.batch * p.heads_q / heads;
  items_at_once =
      std::clamp<int64_t>(kScoreBytesAtOnce / (rows * keys * 4), 1, std::max<int64_t>(1, items));
}

UnfusedTypes::UnfusedTypes(const Problem& p, const Config& config)
    : tensors(p.dtype_q), packed(config.arithmetic == Arithmetic::kF32 ? Dtype::kF32 : p.dtype_q) {}

UnfusedWorkspace::UnfusedWorkspace(void* base, Dtype packed, const UnfusedShape& shape) {
  constexpr size_t kAlignment = 256;  // what cuBLASLt likes
  Carver carver(base, kAlignment);
  const auto take_packed = [&](int64_t elements) -> void* {
    return carver.take<std::byte>(elements * static_cast<int64_t>(dtype_bytes(packed)));
  };
  const int64_t n = shape.items_at_once;
  q = take_packed(n * shape.rows * shape.columns_qk);
  k = take_packed(n * shape.keys * shape.columns_qk);
  v = take_packed(n * shape.keys * shape.columns_v);
  s = carver.take<float>(n * shape.rows * shape.keys);
  p = packed == Dtype::kF32 ? s : take_packed(n * shape.rows * shape.keys);
  o = carver.take<float>(n * shape.rows * shape.columns_v);
  m = carver.take<float>(n * shape.rows);
  l = carver.take<float>(n * shape.rows);
  has_special = carver.take<int32_t>(1);
  gemm = carver.take<std::byte>(kGemmBytes);
  bytes = carver.bytes();
}

const Kernel kUnfused{.name = "cuda_unfused",
                      .role = Role::kBaseline,
                      .summary = "cuBLASLt, softmax, cuBLASLt: the baseline, and the last resort",
                      .refusal = refusal,
                      .configure = configure,
                      .variant = variant,
                      .workspace_bytes = workspace_bytes,
                      .estimate_us = estimate_us,
                      .run = run_unfused,
                      .step_us = step_us};

}  // namespace wh::cuda
