#include "verify/answer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <numeric>
#include <random>
#include <set>

#include "cpu/reference/reference.h"
#include "verify/elements.h"
#include "verify/rows.h"

namespace wh {
namespace {

// Queries around the edges of tiles of 64, 128 and 192 rows, the last ones, and random ones.
std::vector<int64_t> sample_rows(const Problem& p, int64_t most_rows) {
  std::mt19937_64 random(static_cast<uint64_t>(p.len_q + p.len_k));
  const auto pairs = static_cast<uint64_t>(p.batch * p.heads_q);
  const auto rows = pairs * static_cast<uint64_t>(p.len_q);
  std::set<int64_t> chosen{0, static_cast<int64_t>(rows) - 1};
  for (const int64_t query : {int64_t{63}, int64_t{64}, int64_t{127}, int64_t{128}, int64_t{191},
                              int64_t{192}, p.len_q - 65, p.len_q - 64, p.len_q - 1}) {
    if (query < 0 || query >= p.len_q) continue;
    chosen.insert(static_cast<int64_t>(random() % pairs) * p.len_q + query);
  }
  const auto wanted = std::min(rows, static_cast<uint64_t>(most_rows));
  while (chosen.size() < wanted) chosen.insert(static_cast<int64_t>(random() % rows));
  return {chosen.begin(), chosen.end()};
}

double tolerance_of(Dtype dtype) {
  return dtype == Dtype::kF32 ? 4e-6 : (dtype == Dtype::kF16 ? 9e-4 : 7e-3);
}

}  // namespace

Expected expected_answer(const HostTensors& data, int64_t most_rows) {
  // The same problem with everything of q's type widened, so that out is rounded to f32 alone.
  Problem p = data.problem;
  Tensors tensors = const_cast<HostTensors&>(data).tensors();
  std::vector<float> mask;
  if (p.mask == MaskKind::kAdditiveQ) {
    mask.resize(static_cast<size_t>(data.mask.size() / bytes_of(p.dtype_q)));
    for (size_t i = 0; i < mask.size(); ++i) {
      mask[i] = get(data.mask.data(), p.dtype_q, static_cast<int64_t>(i));
    }
    tensors.mask = mask.data();
    p.mask = MaskKind::kAdditiveF32;
  }
  p.dtype_q = Dtype::kF32;
  p.wants_log_sum_exp = true;
  // One row at a time: its query and its answer lie where every row's would.
  p.stride_q = p.stride_out = {0, 0, 0, 1};

  Expected expected;
  const int64_t all_rows = p.batch * p.heads_q * p.len_q;
  if (most_rows > 0 && most_rows < all_rows) {
    expected.rows = sample_rows(p, most_rows);
  } else {
    expected.rows.resize(static_cast<size_t>(all_rows));
    std::iota(expected.rows.begin(), expected.rows.end(), 0);
  }
  const auto rows = static_cast<int64_t>(expected.rows.size());
  expected.out.resize(static_cast<size_t>(rows * p.dim_v));
  expected.log_sum_exp.resize(expected.rows.size());
  std::vector<float> log_sum_exp(static_cast<size_t>(all_rows));
  // A few rows of a small problem are not worth a task.
  const int64_t at_once = std::clamp<int64_t>(20000 / (1 + p.len_k * (p.dim_qk + p.dim_v)), 1, 64);
  parallel(default_executor(), static_cast<int32_t>((rows + at_once - 1) / at_once),
           [&](int32_t block) {
             std::vector<float> query(static_cast<size_t>(p.dim_qk));
             std::vector<double> scratch(cpu::reference_workspace_bytes(p) / sizeof(double));
             Tensors t = tensors;
             t.q = query.data();
             t.log_sum_exp = log_sum_exp.data();
             for (int64_t i = block * at_once; i < std::min(rows, (block + 1) * at_once); ++i) {
               const int64_t row = expected.rows[static_cast<size_t>(i)];
               const int64_t pair = row / p.len_q;
               const Strides& stride = data.problem.stride_q;
               for (int64_t d = 0; d < p.dim_qk; ++d) {
                 query[static_cast<size_t>(d)] =
                     get(data.q.data(), data.problem.dtype_q,
                         offset_of(stride, pair / p.heads_q, pair % p.heads_q, row % p.len_q, d));
               }
               t.out = expected.out.data() + i * p.dim_v;
               cpu::reference_rows(p, t, row, row + 1, scratch.data());
               expected.log_sum_exp[static_cast<size_t>(i)] = log_sum_exp[static_cast<size_t>(row)];
             }
           });
  return expected;
}

Difference compare(const HostTensors& data, const Expected& expected) {
  const Problem& p = data.problem;
  Difference difference;
  difference.tolerance = tolerance_of(p.dtype_q);
  const double element_bound =
      6 * difference.tolerance * std::max(1e-3, static_cast<double>(data.largest_value));
  double error_squares = 0, squares = 0;
  const auto report = [&](std::string message) {
    if (difference.message.empty()) difference.message = std::move(message);
  };
  const auto compare_element = [&](int64_t b, int64_t h, int64_t i, int64_t d, float want) {
    const float have = get(data.out.data(), p.dtype_q, offset_of(p.stride_out, b, h, i, d));
    if (std::isfinite(want) != std::isfinite(have)) {
      return report(fmt::format("out[{}, {}, {}, {}] is {}, expected {}", b, h, i, d, have, want));
    }
    if (!std::isfinite(want)) return;
    const double error = std::fabs(static_cast<double>(have) - want);
    error_squares += error * error;
    squares += static_cast<double>(want) * want;
    difference.worst = std::max(difference.worst, error / element_bound);
    if (error > element_bound) {
      report(fmt::format("out[{}, {}, {}, {}] is {}, expected {}: off by {:.3g}, bound {:.3g}", b,
                         h, i, d, have, want, error, element_bound));
    }
  };
  for (size_t i = 0; i < expected.rows.size(); ++i) {
    const int64_t row = expected.rows[i], pair = row / p.len_q;
    for (int64_t d = 0; d < p.dim_v; ++d) {
      compare_element(pair / p.heads_q, pair % p.heads_q, row % p.len_q, d,
                      expected.out[i * static_cast<size_t>(p.dim_v) + static_cast<size_t>(d)]);
    }
  }
  difference.relative_rms =
      squares > 0 ? std::sqrt(error_squares / squares) : (error_squares > 0 ? INFINITY : 0);
  // A mean over a handful of elements, all near 0 by chance, says nothing: the bound on each of
  // them does. So it is with a handful of columns of V, whose sums cancel alike in every row.
  constexpr size_t kFewestElements = 32;
  constexpr int64_t kFewestColumns = 8;
  if (difference.relative_rms > difference.tolerance && expected.out.size() >= kFewestElements &&
      p.batch * p.heads_kv * p.dim_v >= kFewestColumns) {
    report(fmt::format("relative RMS of out is {:.3g}, tolerance {:.3g}", difference.relative_rms,
                       difference.tolerance));
  }
  if (!p.wants_log_sum_exp) return difference;
  const auto* lse = reinterpret_cast<const float*>(data.log_sum_exp.data());
  for (size_t i = 0; i < expected.rows.size(); ++i) {
    const float want = expected.log_sum_exp[i], have = lse[expected.rows[i]];
    const bool matches = std::isfinite(want)
                             ? std::fabs(have - want) <= 1e-5 + 4e-6 * std::fabs(want)
                             : (std::isnan(want) ? !std::isfinite(have) : have == want);
    if (!matches) {
      report(fmt::format("log_sum_exp of row {} is {}, expected {}", expected.rows[i], have, want));
    }
  }
  return difference;
}

std::string disagreement(const HostTensors& data, const std::vector<std::byte>& other_out) {
  const Problem& p = data.problem;
  // For one row, where errors do not average out as over all of them: a wrong one is off by 1.
  const double most = 10 * tolerance_of(p.dtype_q);
  std::mutex mutex;
  std::string message;
  for_each_row(p.batch, p.heads_q, p.len_q, [&](RowIndex row) {
    double error_squares = 0, squares = 0;
    const int64_t first = offset_of(p.stride_out, row.batch_idx, row.head, row.idx, 0);
    for (int64_t d = 0; d < p.dim_v; ++d) {
      const int64_t offset = first + d * p.stride_out[3];
      const double have = get(data.out.data(), p.dtype_q, offset);
      const double other = get(other_out.data(), p.dtype_q, offset);
      error_squares += (have - other) * (have - other);
      squares += other * other;
    }
    if (error_squares <= most * most * squares) return;
    const std::lock_guard lock(mutex);
    message = fmt::format("out[{}, {}, {}] is off by {:.3g} of its length from another kernel's",
                          row.batch_idx, row.head, row.idx, std::sqrt(error_squares / squares));
  });
  return message;
}

}  // namespace wh
