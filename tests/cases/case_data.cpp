#include "case_data.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>

#include "core/array_mask.h"
#include "core/key_range.h"
#include "cpu/reference.h"

namespace wh {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// NaN as f32, f16 and bf16 alike, and odd as a mask byte.
constexpr std::byte kPoison{0xff};

using Extents = std::array<int64_t, 4>;

int64_t offset_of(const Strides& stride, int64_t b, int64_t h, int64_t i, int64_t d) {
  return b * stride[0] + h * stride[1] + i * stride[2] + d * stride[3];
}

int64_t span(const Extents& extents, const Strides& stride) {
  int64_t last = 0;
  for (int i = 0; i < 4; ++i) {
    if (extents[i] == 0) return 0;
    last += (extents[i] - 1) * stride[i];
  }
  return last + 1;
}

void for_each(const Extents& e,
              const std::function<void(int64_t, int64_t, int64_t, int64_t)>& body) {
  for (int64_t b = 0; b < e[0]; ++b) {
    for (int64_t h = 0; h < e[1]; ++h) {
      for (int64_t i = 0; i < e[2]; ++i) {
        for (int64_t d = 0; d < e[3]; ++d) body(b, h, i, d);
      }
    }
  }
}

void put(std::byte* data, Dtype dtype, int64_t offset, float value) {
  const auto store = [&](auto element) {
    std::memcpy(data + offset * static_cast<int64_t>(sizeof(element)), &element, sizeof(element));
  };
  if (dtype == Dtype::kF32) store(value);
  if (dtype == Dtype::kF16) store(from_float<Half>(value));
  if (dtype == Dtype::kBf16) store(from_float<Bfloat16>(value));
}

float get(const std::byte* data, Dtype dtype, int64_t offset) {
  if (dtype == Dtype::kF32) return reinterpret_cast<const float*>(data)[offset];
  if (dtype == Dtype::kF16) return to_float(reinterpret_cast<const Half*>(data)[offset]);
  return to_float(reinterpret_cast<const Bfloat16*>(data)[offset]);
}

Dtype mask_dtype(const Problem& p) {
  return p.mask == MaskKind::kAdditiveF32 ? Dtype::kF32 : p.dtype_q;
}

void fill_mask(const Case& c, CaseData& data, std::mt19937_64& random) {
  const Problem& p = c.problem;
  if (p.mask == MaskKind::kNone) return;
  const Extents extents{p.batch, p.heads_q, p.len_q, p.len_k};
  const bool is_boolean = p.mask == MaskKind::kBoolean;
  const auto bytes = is_boolean ? 1 : static_cast<int64_t>(dtype_bytes(mask_dtype(p)));
  data.mask = GuardedTensor(span(extents, p.stride_mask) * bytes);
  std::normal_distribution<float> normal;
  for_each(extents, [&](int64_t b, int64_t h, int64_t i, int64_t j) {
    bool attend = random() % 4 != 0;
    if (c.mask_pattern == MaskPattern::kWholeRows) attend = i % 3 != 0;
    if (c.mask_pattern == MaskPattern::kAlternatingKeys) attend = j % 2 == 0;
    const int64_t offset = offset_of(p.stride_mask, b, h, i, j);
    if (is_boolean) {
      data.mask.data()[offset] =
          attend ? std::byte{static_cast<uint8_t>(1 + random() % 255)} : std::byte{0};
    } else {
      put(data.mask.data(), mask_dtype(p), offset, attend ? normal(random) : -kInfinity);
    }
  });
}

// Which keys of one (batch, kv head) any row of the group sees.
std::vector<bool> seen_keys(const Problem& p, const Tensors& t, int64_t b, int64_t head_kv) {
  std::vector<bool> seen(static_cast<size_t>(p.len_k), false);
  for (int64_t g = 0; g < p.group(); ++g) {
    for (int64_t i = 0; i < p.len_q; ++i) {
      const KeyRange keys = visible_keys(p, present_keys(p, t, b), i);
      for (int64_t j = keys.begin; j < keys.end; ++j) {
        if (seen[static_cast<size_t>(j)]) continue;
        seen[static_cast<size_t>(j)] =
            mask_bias(p, t.mask, b, head_kv * p.group() + g, i, j) != -kInfinity;
      }
    }
  }
  return seen;
}

void fill_kv(const Case& c, CaseData& data, std::mt19937_64& random) {
  const Problem& p = c.problem;
  const Tensors t = data.tensors();
  std::normal_distribution<float> normal;
  // Heads that share memory (stride 0) must agree on which keys are seen.
  std::vector<std::vector<bool>> seen(static_cast<size_t>(p.batch));
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads_kv; ++h) {
      std::vector<bool> keys = seen_keys(p, t, b, h);
      if (p.stride_k[1] == 0) {
        for (int64_t other = 0; other < p.heads_kv; ++other) {
          const std::vector<bool> more = seen_keys(p, t, b, other);
          for (size_t j = 0; j < keys.size(); ++j) keys[j] = keys[j] || more[j];
        }
      }
      for (int64_t j = 0; j < p.len_k; ++j) {
        const bool is_seen = keys[static_cast<size_t>(j)];
        const bool is_nan = !is_seen || (c.has_visible_nan && random() % 16 == 0);
        const float poison = random() % 2 == 0 || is_seen ? kNan : kInfinity;
        for (int64_t d = 0; d < p.dim_qk; ++d) {
          put(data.k.data(), p.dtype_kv, offset_of(p.stride_k, b, h, j, d),
              is_nan ? poison : normal(random));
        }
        for (int64_t d = 0; d < p.dim_v; ++d) {
          put(data.v.data(), p.dtype_kv, offset_of(p.stride_v, b, h, j, d),
              is_nan ? poison : c.mean_v + normal(random));
        }
      }
    }
  }
}

// The largest |v| that is not poison.
float largest_value(const CaseData& data) {
  const Problem& p = data.problem;
  float largest = 0;
  for_each({p.batch, p.heads_kv, p.len_k, p.dim_v},
           [&](int64_t b, int64_t h, int64_t j, int64_t d) {
             const float value =
                 std::fabs(get(data.v.data(), p.dtype_kv, offset_of(p.stride_v, b, h, j, d)));
             if (std::isfinite(value)) largest = std::max(largest, value);
           });
  return largest;
}

}  // namespace

GuardedTensor::GuardedTensor(int64_t bytes)
    : bytes_(static_cast<size_t>(bytes + 2 * kGuardBytes), kPoison), size_(bytes) {}

bool GuardedTensor::guards_intact() const {
  const auto is_poison = [](std::byte byte) { return byte == kPoison; };
  return bytes_.empty() || (std::all_of(bytes_.begin(), bytes_.begin() + kGuardBytes, is_poison) &&
                            std::all_of(bytes_.end() - kGuardBytes, bytes_.end(), is_poison));
}

CaseData::CaseData(const Case& c) : problem(c.problem) {
  const Problem& p = problem;
  std::mt19937_64 random(c.seed);
  std::normal_distribution<float> normal;
  const auto bytes_q = static_cast<int64_t>(dtype_bytes(p.dtype_q));
  const auto bytes_kv = static_cast<int64_t>(dtype_bytes(p.dtype_kv));
  const Extents extents_q{p.batch, p.heads_q, p.len_q, p.dim_qk};
  const Extents extents_out{p.batch, p.heads_q, p.len_q, p.dim_v};
  q = GuardedTensor(span(extents_q, p.stride_q) * bytes_q);
  k = GuardedTensor(span({p.batch, p.heads_kv, p.len_k, p.dim_qk}, p.stride_k) * bytes_kv);
  v = GuardedTensor(span({p.batch, p.heads_kv, p.len_k, p.dim_v}, p.stride_v) * bytes_kv);
  out = GuardedTensor(span(extents_out, p.stride_out) * bytes_q);
  if (p.wants_log_sum_exp) log_sum_exp = GuardedTensor(p.batch * p.heads_q * p.len_q * 4);
  if (p.has_sinks) {
    sinks = GuardedTensor(p.heads_q * 4);
    for (int64_t h = 0; h < p.heads_q; ++h) put(sinks.data(), Dtype::kF32, h, normal(random));
  }
  const auto copy = [](const std::vector<int32_t>& from, GuardedTensor& to) {
    if (from.empty()) return;
    to = GuardedTensor(static_cast<int64_t>(from.size() * 4));
    std::memcpy(to.data(), from.data(), from.size() * 4);
  };
  copy(c.key_lengths, key_lengths);
  copy(c.key_starts, key_starts);
  for_each(extents_q, [&](int64_t b, int64_t h, int64_t i, int64_t d) {
    put(q.data(), p.dtype_q, offset_of(p.stride_q, b, h, i, d), normal(random));
  });
  fill_mask(c, *this, random);
  fill_kv(c, *this, random);
  out_owned.assign(static_cast<size_t>(out.size()), 0);
  for_each(extents_out, [&](int64_t b, int64_t h, int64_t i, int64_t d) {
    const int64_t at = offset_of(p.stride_out, b, h, i, d) * bytes_q;
    std::fill_n(out_owned.begin() + at, bytes_q, uint8_t{1});
  });
}

Tensors CaseData::tensors() {
  const auto floats = [](GuardedTensor& tensor) { return reinterpret_cast<float*>(tensor.data()); };
  const auto ints = [](GuardedTensor& tensor) { return reinterpret_cast<int32_t*>(tensor.data()); };
  Tensors t;
  t.q = q.data();
  t.k = k.data();
  t.v = v.data();
  t.out = out.data();
  if (problem.mask != MaskKind::kNone) t.mask = mask.data();
  if (problem.has_sinks) t.sinks = floats(sinks);
  if (problem.has_key_lengths) t.key_lengths = ints(key_lengths);
  if (problem.has_key_starts) t.key_starts = ints(key_starts);
  if (problem.wants_log_sum_exp) t.log_sum_exp = floats(log_sum_exp);
  return t;
}

void CaseData::poison_outputs() {
  std::fill_n(out.data(), out.size(), kPoison);
  std::fill_n(log_sum_exp.data(), log_sum_exp.size(), kPoison);
}

std::string CaseData::damage() const {
  if (!out.guards_intact()) return "memory around out was written";
  if (problem.wants_log_sum_exp && !log_sum_exp.guards_intact()) {
    return "memory around log_sum_exp was written";
  }
  for (int64_t i = 0; i < out.size(); ++i) {
    if (out_owned[static_cast<size_t>(i)] == 0 && out.data()[i] != kPoison) {
      return fmt::format("byte {} between the elements of out was written", i);
    }
  }
  return "";
}

Expected expected_answer(const CaseData& data) {
  // The same problem with everything of q's type widened, so that out is rounded to f32 alone.
  Problem p = data.problem;
  CaseData& source = const_cast<CaseData&>(data);
  Tensors t = source.tensors();
  Expected expected;
  std::vector<float> q(static_cast<size_t>(p.batch * p.heads_q * p.len_q * p.dim_qk));
  const Strides stride_q = dense_strides(p.heads_q, p.len_q, p.dim_qk);
  for_each({p.batch, p.heads_q, p.len_q, p.dim_qk},
           [&](int64_t b, int64_t h, int64_t i, int64_t d) {
             q[static_cast<size_t>(offset_of(stride_q, b, h, i, d))] =
                 get(data.q.data(), p.dtype_q, offset_of(p.stride_q, b, h, i, d));
           });
  std::vector<float> mask;
  if (p.mask == MaskKind::kAdditiveQ) {
    mask.resize(
        static_cast<size_t>(data.mask.size() / static_cast<int64_t>(dtype_bytes(p.dtype_q))));
    for (size_t i = 0; i < mask.size(); ++i) {
      mask[i] = get(data.mask.data(), p.dtype_q, static_cast<int64_t>(i));
    }
    t.mask = mask.data();
    p.mask = MaskKind::kAdditiveF32;
  }
  expected.out.resize(static_cast<size_t>(p.batch * p.heads_q * p.len_q * p.dim_v));
  expected.log_sum_exp.resize(static_cast<size_t>(p.batch * p.heads_q * p.len_q));
  p.dtype_q = Dtype::kF32;
  p.stride_q = stride_q;
  p.stride_out = dense_strides(p.heads_q, p.len_q, p.dim_v);
  p.wants_log_sum_exp = true;
  t.q = q.data();
  t.out = expected.out.data();
  t.log_sum_exp = expected.log_sum_exp.data();
  std::vector<double> scratch(cpu::reference_workspace_bytes(p) / sizeof(double));
  cpu::reference_rows(p, t, 0, p.batch * p.heads_q * p.len_q, scratch.data());
  return expected;
}

Difference compare(const CaseData& data, const Expected& expected) {
  const Problem& p = data.problem;
  Difference difference;
  difference.tolerance = p.dtype_q == Dtype::kF32 ? 4e-6 : (p.dtype_q == Dtype::kF16 ? 9e-4 : 7e-3);
  const double element_bound =
      6 * difference.tolerance * std::max(1e-3, static_cast<double>(largest_value(data)));
  double error_squares = 0, squares = 0;
  const auto report = [&](std::string message) {
    if (difference.message.empty()) difference.message = std::move(message);
  };
  const Strides dense = dense_strides(p.heads_q, p.len_q, p.dim_v);
  for_each({p.batch, p.heads_q, p.len_q, p.dim_v}, [&](int64_t b, int64_t h, int64_t i, int64_t d) {
    const float want = expected.out[static_cast<size_t>(offset_of(dense, b, h, i, d))];
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
  });
  difference.relative_rms =
      squares > 0 ? std::sqrt(error_squares / squares) : (error_squares > 0 ? INFINITY : 0);
  // A mean over a handful of elements, all near 0 by chance, says nothing: the bound on each of
  // them does.
  constexpr size_t kFewestElements = 32;
  if (difference.relative_rms > difference.tolerance && expected.out.size() >= kFewestElements) {
    report(fmt::format("relative RMS of out is {:.3g}, tolerance {:.3g}", difference.relative_rms,
                       difference.tolerance));
  }
  if (!p.wants_log_sum_exp) return difference;
  const auto* lse = reinterpret_cast<const float*>(data.log_sum_exp.data());
  for (size_t row = 0; row < expected.log_sum_exp.size(); ++row) {
    const float want = expected.log_sum_exp[row];
    const bool matches = std::isfinite(want)
                             ? std::fabs(lse[row] - want) <= 1e-5 + 4e-6 * std::fabs(want)
                             : (std::isnan(want) ? !std::isfinite(lse[row]) : lse[row] == want);
    if (!matches) {
      report(fmt::format("log_sum_exp of row {} is {}, expected {}", row, lse[row], want));
    }
  }
  return difference;
}

}  // namespace wh
