#include "measure/sampled_rows.h"

#include <algorithm>

#include "core/array_mask.h"
#include "cpu/reference/reference.h"

namespace wh::cli {
namespace {

constexpr int64_t kMostRows = 64;
constexpr double kBudgetUs = 3e5;
constexpr double kReferenceUs = 1.5e-3;  // a key and dimension, as cpu_reference estimates itself

// Steps of the golden ratio: even over any range, and in step with no number of heads or queries.
int64_t spread(int64_t k, int64_t total) {
  const auto fraction = static_cast<uint64_t>(k) * 0x9e3779b97f4a7c15u;
  return static_cast<int64_t>(
      static_cast<unsigned __int128>(fraction) * static_cast<unsigned __int128>(total) >> 64);
}

// The reference on one row at a time, in f32: rounded to 16 bits, its answer would hide the error
// that is looked for.
class ReferenceRow {
 public:
  ReferenceRow(const Problem& p, const HostTensors& host) : p_(p), host_(host), one_(p) {
    one_.dtype_q = Dtype::kF32;
    one_.stride_q = one_.stride_out = {0, 0, 0, 1};
    one_.wants_log_sum_exp = false;
    tensors_ = host.tensors;
    if (p_.values_in_keys) tensors_.v = tensors_.k;
    tensors_.q = q_.data();
    if (p.mask == MaskKind::kNone) return;
    mask_.resize(static_cast<size_t>(p.len_k));
    one_.mask = MaskKind::kAdditiveF32;
    one_.stride_mask = {0, 0, 0, 1};
    tensors_.mask = mask_.data();
  }

  void append(int64_t row, SampledRows& rows) {
    const int64_t i = row % p_.len_q, head = row / p_.len_q % p_.heads_q;
    const int64_t b = row / p_.len_q / p_.heads_q;
    for (int64_t d = 0; d < p_.dim_qk; ++d) {
      q_[static_cast<size_t>(d)] =
          load_float(host_.tensors.q, p_.dtype_q, offset(p_.stride_q, b, head, i, d));
    }
    for (size_t j = 0; j < mask_.size(); ++j) {
      mask_[j] = mask_bias(p_, host_.tensors.mask, b, head, i, static_cast<int64_t>(j));
    }
    const size_t begin = rows.want.size();
    rows.want.resize(begin + static_cast<size_t>(p_.dim_v));
    tensors_.out = rows.want.data() + begin;
    cpu::reference_rows(one_, tensors_, row, row + 1, scratch_.data());
    for (int64_t d = 0; d < p_.dim_v; ++d) {
      rows.have.push_back(
          load_float(host_.out.data(), p_.dtype_q, offset(p_.stride_out, b, head, i, d)));
    }
    ++rows.count;
  }

 private:
  static int64_t offset(const Strides& stride, int64_t b, int64_t head, int64_t i, int64_t d) {
    return b * stride[0] + head * stride[1] + i * stride[2] + d * stride[3];
  }

  const Problem& p_;
  const HostTensors& host_;
  Problem one_;
  Tensors tensors_;
  std::vector<float> q_ = std::vector<float>(static_cast<size_t>(p_.dim_qk));
  std::vector<float> mask_;
  std::vector<double> scratch_ =
      std::vector<double>(cpu::reference_workspace_bytes(p_) / sizeof(double));
};

}  // namespace

SampledRows sample_rows(const Problem& p, const HostTensors& host) {
  const int64_t total = p.batch * p.heads_q * p.len_q;
  const double row_us = kReferenceUs * static_cast<double>(p.len_k * (p.dim_qk + p.dim_v));
  const auto affordable = static_cast<int64_t>(
      std::clamp(kBudgetUs / std::max(1.0, row_us), 1.0, static_cast<double>(kMostRows)));
  SampledRows rows;
  if (total == 0) return rows;
  ReferenceRow reference(p, host);
  if (total <= affordable) {
    for (int64_t row = 0; row < total; ++row) reference.append(row, rows);
  } else {
    for (int64_t k = 0; k < affordable; ++k) reference.append(spread(k, total), rows);
  }
  return rows;
}

}  // namespace wh::cli
