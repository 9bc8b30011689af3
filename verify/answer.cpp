#include "verify/answer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <numeric>
#include <random>
#include <set>

#include "core/rounding.h"
#include "core/sequence.h"
#include "cpu/reference/reference.h"
#include "verify/elements.h"
#include "verify/rows.h"

namespace wh {
namespace {

constexpr int64_t kAffordableRows = 64;
constexpr double kBudgetUs = 3e5;
constexpr double kReferenceUs = 1.5e-3;  // a key and dimension, as cpu_reference estimates itself

// All of them, or as many as are wanted.
std::vector<int64_t> rows_to_look_at(const Problem& p, const Tensors& tensors, int64_t most_rows) {
  const int64_t all_rows = query_rows(p, tensors);
  const int64_t wanted = most_rows > 0 ? most_rows : all_rows;
  const bool is_dense = p.query_layout == QueryLayout::kDense;
  return is_dense ? sampled_rows(p.batch * p.heads_q, p.len_q, wanted)
                  : sampled_rows(1, all_rows, wanted);
}

// The reference on one row at a time, in f32: rounded to 16 bits, its answer would hide the error
// that is looked for.
class ReferenceRow {
 public:
  ReferenceRow(const Problem& p, const Tensors& tensors)
      : p_(p), given_(tensors), one_(p), tensors_(tensors) {
    one_.dtype_q = Dtype::kF32;
    one_.wants_log_sum_exp = true;
    // Its query and its answer lie where every row's would.
    one_.stride_q = one_.stride_out = {0, 0, 0, 1};
    tensors_.q = q_.data();
    if (p.values_in_keys) tensors_.v = tensors_.k;
    if (p.mask != MaskKind::kAdditiveQ) return;
    // Of q's type, it widens with q.
    mask_.resize(static_cast<size_t>(p.len_k));
    one_.mask = MaskKind::kAdditiveF32;
    one_.stride_mask = {0, 0, 0, 1};
    tensors_.mask = mask_.data();
  }

  // Writes its dim_v values; `log_sum_exp` has room for that of every row.
  void run(int64_t row, float* out, float* log_sum_exp) {
    const auto [b, head, i] = query_row(p_, row);
    for (int64_t d = 0; d < p_.dim_qk; ++d) {
      q_[static_cast<size_t>(d)] =
          load_element(given_.q, p_.dtype_q, offset_of(p_.stride_q, b, head, i, d));
    }
    for (size_t j = 0; j < mask_.size(); ++j) {
      mask_[j] = load_element(given_.mask, p_.dtype_q,
                              offset_of(p_.stride_mask, b, head, i, static_cast<int64_t>(j)));
    }
    tensors_.out = out;
    tensors_.log_sum_exp = log_sum_exp;
    cpu::reference_rows(one_, tensors_, row, row + 1, scratch_.data());
  }

 private:
  const Problem& p_;
  const Tensors& given_;
  Problem one_;
  Tensors tensors_;
  std::vector<float> q_ = std::vector<float>(static_cast<size_t>(p_.dim_qk));
  std::vector<float> mask_;
  std::vector<double> scratch_ =
      std::vector<double>(cpu::reference_workspace_bytes(p_) / sizeof(double));
};

}  // namespace

// The last row and the first, queries around the edges of tiles of 64, 128 and 192 rows, and random
// ones.
std::vector<int64_t> sampled_rows(int64_t all_pairs, int64_t length, int64_t most_rows) {
  const auto pairs = static_cast<uint64_t>(all_pairs);
  const auto rows = pairs * static_cast<uint64_t>(length);
  if (static_cast<uint64_t>(most_rows) >= rows) {
    std::vector<int64_t> all(rows);
    std::iota(all.begin(), all.end(), 0);
    return all;
  }
  std::mt19937_64 random(static_cast<uint64_t>(length));
  std::set<int64_t> chosen;
  const auto choose = [&](uint64_t row) {
    if (chosen.size() < static_cast<size_t>(most_rows)) chosen.insert(static_cast<int64_t>(row));
  };
  choose(rows - 1);
  choose(0);
  for (const int64_t query : {int64_t{63}, int64_t{64}, int64_t{127}, int64_t{128}, int64_t{191},
                              int64_t{192}, length - 65, length - 64, length - 1}) {
    if (query < 0 || query >= length) continue;
    choose(random() % pairs * static_cast<uint64_t>(length) + static_cast<uint64_t>(query));
  }
  while (chosen.size() < static_cast<size_t>(most_rows)) choose(random() % rows);
  return {chosen.begin(), chosen.end()};
}

int64_t affordable_rows(double multiply_adds) {
  const double row_us = kReferenceUs * multiply_adds;
  return static_cast<int64_t>(
      std::clamp(kBudgetUs / std::max(1.0, row_us), 1.0, static_cast<double>(kAffordableRows)));
}

int64_t affordable_rows(const Problem& p) {
  return affordable_rows(static_cast<double>(p.len_k * (p.dim_qk + p.dim_v)));
}

Expected expected_answer(const Problem& p, const Tensors& tensors, int64_t most_rows) {
  return expected_rows(p, tensors, rows_to_look_at(p, tensors, most_rows));
}

Expected expected_rows(const Problem& p, const Tensors& tensors, std::vector<int64_t> looked_at) {
  Expected expected;
  expected.rows = std::move(looked_at);
  const auto rows = static_cast<int64_t>(expected.rows.size());
  expected.out.resize(static_cast<size_t>(rows * p.dim_v));
  expected.log_sum_exp.resize(expected.rows.size());
  std::vector<float> log_sum_exp(static_cast<size_t>(all_query_rows(p)));
  // A few rows of a small problem are not worth a task.
  const int64_t at_once = std::clamp<int64_t>(20000 / (1 + p.len_k * (p.dim_qk + p.dim_v)), 1, 64);
  parallel(default_executor(), static_cast<int32_t>(divide_up(rows, at_once)), [&](int32_t block) {
    ReferenceRow reference(p, tensors);
    for (int64_t i = block * at_once; i < std::min(rows, (block + 1) * at_once); ++i) {
      const int64_t row = expected.rows[static_cast<size_t>(i)];
      reference.run(row, expected.out.data() + i * p.dim_v, log_sum_exp.data());
      expected.log_sum_exp[static_cast<size_t>(i)] = log_sum_exp[static_cast<size_t>(row)];
    }
  });
  return expected;
}

std::vector<float> rows_of_out(const Problem& p, const Tensors& tensors,
                               const std::vector<int64_t>& rows) {
  std::vector<float> out;
  out.reserve(rows.size() * static_cast<size_t>(p.dim_v));
  for (const int64_t row : rows) {
    const QueryRow at = query_row(p, row);
    const int64_t first = offset_of(p.stride_out, at.query_batch, at.head_q, at.query_idx, 0);
    for (int64_t d = 0; d < p.dim_v; ++d) {
      out.push_back(load_element(tensors.out, p.dtype_out(), first + d * p.stride_out[3]));
    }
  }
  return out;
}

std::vector<float> all_of_out(const Problem& p, const Tensors& tensors) {
  return rows_of_out(p, tensors, rows_to_look_at(p, tensors, 0));
}

Errors errors_of(const Problem& p, const Tensors& tensors, const Expected& expected) {
  const std::vector<float> have = rows_of_out(p, tensors, expected.rows);
  Errors errors;
  for (size_t i = 0; i < have.size(); ++i) errors.add(have[i], expected.out[i]);
  return errors;
}

Difference compare(const HostTensors& data, const Expected& expected) {
  const Problem& p = data.problem;
  Difference difference;
  difference.tolerance = tolerance_of(p.dtype_q);
  const double element_bound =
      6 * difference.tolerance * std::max(1e-3, static_cast<double>(data.largest_value));
  const auto report = [&](std::string message) {
    if (difference.message.empty()) difference.message = std::move(message);
  };
  const std::vector<float> out = rows_of_out(p, data.tensors(), expected.rows);
  Errors errors;
  for (size_t i = 0; i < out.size(); ++i) {
    const float have = out[i], want = expected.out[i];
    const auto at = [&] {
      const QueryRow row = query_row(p, expected.rows[i / static_cast<size_t>(p.dim_v)]);
      return fmt::format("out[{}, {}, {}, {}] is {}, expected {}", row.query_batch, row.head_q,
                         row.query_idx, i % static_cast<size_t>(p.dim_v), have, want);
    };
    if (std::isfinite(want) != std::isfinite(have)) report(at());
    if (!std::isfinite(want) || !std::isfinite(have)) continue;
    errors.add(have, want);
    const double error = std::fabs(static_cast<double>(have) - want);
    difference.worst = std::max(difference.worst, error / element_bound);
    if (error > element_bound) {
      report(fmt::format("{}: off by {:.3g}, bound {:.3g}", at(), error, element_bound));
    }
  }
  // A mean over a handful of elements, all near 0 by chance, says nothing: the bound on each of
  // them does. So it is with a handful of columns of V, whose sums cancel alike in every row.
  constexpr size_t kFewestElements = 32;
  constexpr int64_t kFewestColumns = 8;
  if (expected.out.size() >= kFewestElements && p.batch * p.heads_kv * p.dim_v >= kFewestColumns) {
    difference.relative_rms = errors.relative_rms();
  }
  if (difference.relative_rms > difference.tolerance) {
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
  for_each_row(1, 1, query_rows(p, data.tensors()), [&](RowIndex one) {
    const QueryRow row = query_row(p, one.idx);
    Errors errors;
    const int64_t first = offset_of(p.stride_out, row.query_batch, row.head_q, row.query_idx, 0);
    for (int64_t d = 0; d < p.dim_v; ++d) {
      const int64_t offset = first + d * p.stride_out[3];
      errors.add(load_element(data.out.data(), p.dtype_out(), offset),
                 load_element(other_out.data(), p.dtype_out(), offset));
    }
    if (errors.relative_rms() <= most) return;
    const std::lock_guard lock(mutex);
    message = fmt::format("out[{}, {}, {}] is off by {:.3g} of its length from another kernel's",
                          row.query_batch, row.head_q, row.query_idx, errors.relative_rms());
  });
  return message;
}

}  // namespace wh
