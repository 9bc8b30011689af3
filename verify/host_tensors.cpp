#include "verify/host_tensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#include "core/array_mask.h"
#include "core/key_range.h"
#include "verify/elements.h"
#include "verify/random_rows.h"
#include "verify/rows.h"

namespace wh {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// NaN as f32, f16 and bf16 alike, and odd as a mask byte.
constexpr std::byte kPoison{0xff};
constexpr std::align_val_t kAlignment{64};

// Streams of random numbers.
enum Stream : uint64_t { kOfQ, kOfK, kOfV, kOfMask, kOfSinks, kOfPoison };

struct TensorRow {
  std::byte* data;
  Dtype dtype;
  int64_t offset, stride, dim;

  // Answers with the largest |value|.
  float fill(RowRandom random, float mean) const {
    float largest = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const float value = mean + random.normal();
      largest = std::max(largest, std::fabs(value));
      put(data, dtype, offset + d * stride, value);
    }
    return largest;
  }
  void fill(float value) const {
    for (int64_t d = 0; d < dim; ++d) put(data, dtype, offset + d * stride, value);
  }
};

// Batch entries, heads or rows that share memory are one.
int64_t distinct(int64_t extent, int64_t stride) {
  return stride == 0 ? std::min<int64_t>(1, extent) : extent;
}

Dtype mask_dtype(const Problem& p) {
  return p.mask == MaskKind::kAdditiveF32 ? Dtype::kF32 : p.dtype_q;
}

// The smallest number above 0, the largest, and the lowest that a bias hides nothing by: finite
// where that does not swallow scores by rounding, as it would in f16.
struct Extremes {
  float smallest, highest, lowest_bias;
};
Extremes extremes_of(Dtype dtype) {
  constexpr float kHighestF32 = std::numeric_limits<float>::max();
  constexpr float kHighestBf16 = 0x1.fep127f;
  switch (dtype) {
    case Dtype::kF32:
      return {0x1p-149f, kHighestF32, -kHighestF32};
    case Dtype::kF16:
      return {0x1p-24f, 65504.0f, -kInfinity};
    case Dtype::kBf16:
      return {0x1p-133f, kHighestBf16, -kHighestBf16};
  }
  return {};
}

// Finite numbers of the type, from its smallest to its largest, of either sign. Two of them are
// equal or so far apart that the lower one weighs nothing.
float extreme(RowRandom& random, Dtype dtype) {
  const auto [smallest, highest, lowest_bias] = extremes_of(dtype);
  const float sizes[] = {0, 1e4f, 3e4f, 1e9f, 1e12f, 1e20f, 6e37f, smallest, highest};
  const float size = std::min(sizes[(random.bits() >> 8) % std::size(sizes)], highest);
  return random.bits() % 2 == 0 ? size : -size;
}

// What f32 rounds away beside a bias of 1e9, float64 does from 1e17 on: in between the answers
// would differ, and neither is wrong. So queries are 0, and the answer is a mean of V. Every fourth
// row masks as programs do, by biases that are too low for float64 too.
bool masks_as_programs_do(int64_t query_idx) { return query_idx % 4 == 0; }

class ExtremeBiases {
 public:
  ExtremeBiases(RowRandom& random, Dtype dtype, int64_t query_idx)
      : one_(extreme(random, dtype)),
        other_(random.bits() % 3 == 0 ? one_ : extreme(random, dtype)) {
    if (!masks_as_programs_do(query_idx)) return;
    one_ = 0;
    other_ =
        random.bits() % 2 == 0 || dtype == Dtype::kF16 ? extremes_of(dtype).lowest_bias : -1e20f;
  }
  float of_key(RowRandom& random) const { return random.bits() % 4 != 0 ? one_ : other_; }

 private:
  float one_, other_;
};

bool has_extreme_biases(const Input& input) {
  const MaskKind kind = input.problem.mask;
  return input.mask_pattern == MaskPattern::kExtremes &&
         (kind == MaskKind::kAdditiveF32 || kind == MaskKind::kAdditiveQ);
}

int64_t misalignment(const Input& input) { return input.is_hostile ? 16 : 0; }

void fill_mask(const Input& input, HostTensors& data) {
  const Problem& p = input.problem;
  if (p.mask == MaskKind::kNone) return;
  const Strides& stride = p.stride_mask;
  data.mask = GuardedTensor(tensor_bytes(p).mask, misalignment(input));
  for_each_row(distinct(p.batch, stride[0]), distinct(p.heads_q, stride[1]),
               distinct(p.len_q, stride[2]), [&](RowIndex row) {
                 const int64_t first = offset_of(stride, row.batch_idx, row.head, row.idx, 0);
                 RowRandom random(input.seed, kOfMask, first);
                 if (has_extreme_biases(input)) {
                   const Dtype dtype = mask_dtype(p);
                   const ExtremeBiases biases(random, dtype, row.idx);
                   for (int64_t j = 0; j < p.len_k; ++j) {
                     put(data.mask.data(), dtype, first + j * stride[3], biases.of_key(random));
                   }
                   return;
                 }
                 for (int64_t j = 0; j < p.len_k; ++j) {
                   bool attend = random.bits() % 4 != 0;
                   float hides = -kInfinity;
                   if (input.mask_pattern == MaskPattern::kWholeRows) {
                     attend = row.idx % 3 != 0;
                     if (row.idx % 6 == 3) hides = extremes_of(mask_dtype(p)).lowest_bias;
                   }
                   if (input.mask_pattern == MaskPattern::kAlternatingKeys) attend = j % 2 == 0;
                   const int64_t offset = first + j * stride[3];
                   if (p.mask == MaskKind::kBoolean) {
                     data.mask.data()[offset] =
                         attend ? std::byte{static_cast<uint8_t>(1 + random.bits() % 255)}
                                : std::byte{0};
                   } else {
                     put(data.mask.data(), mask_dtype(p), offset, attend ? random.normal() : hides);
                   }
                 }
               });
}

// Which keys of one (batch, kv head) any row of the group sees.
std::vector<bool> seen_keys(const Problem& p, const Tensors& t, int64_t b, int64_t head_kv) {
  std::vector<bool> seen(static_cast<size_t>(p.len_k), false);
  const KeyRange present = present_keys(p, t, b);
  if (p.mask == MaskKind::kNone) {
    // Ranges move to the right with the query, so that one begins where those before it ended.
    int64_t done = 0;
    for (int64_t i = 0; i < p.len_q; ++i) {
      const KeyRange keys = visible_keys(p, present, i);
      for (int64_t j = std::max(done, keys.begin); j < keys.end; ++j) {
        seen[static_cast<size_t>(j)] = true;
      }
      if (!keys.empty()) done = std::max(done, keys.end);
    }
    return seen;
  }
  for (int64_t g = 0; g < distinct(p.group(), p.stride_mask[1]); ++g) {
    for (int64_t i = 0; i < p.len_q; ++i) {
      const KeyRange keys = visible_keys(p, present, i);
      for (int64_t j = keys.begin; j < keys.end; ++j) {
        if (seen[static_cast<size_t>(j)]) continue;
        seen[static_cast<size_t>(j)] =
            mask_bias(p, t.mask, b, head_kv * p.group() + g, i, j) != -kInfinity;
      }
    }
  }
  return seen;
}

// By (batch, kv head). Those that share memory (stride 0) must agree on which keys are seen.
std::vector<std::vector<bool>> all_seen_keys(const Problem& p, const Tensors& t) {
  std::vector<std::vector<bool>> all;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads_kv; ++h) {
      if (h > 0 && p.mask == MaskKind::kNone) {
        all.push_back(all.back());  // a range is every head's
      } else {
        all.push_back(seen_keys(p, t, b, h));
      }
    }
    if (p.stride_k[1] != 0 && p.stride_v[1] != 0) continue;
    const auto heads = all.end() - p.heads_kv;
    for (auto other = heads; other != all.end(); ++other) {
      for (size_t j = 0; j < heads->size(); ++j) (*heads)[j] = (*heads)[j] || (*other)[j];
    }
    std::fill(heads, all.end(), std::vector<bool>(*heads));
  }
  return all;
}

void raise_to(std::atomic<float>& largest, float value) {
  float before = largest;
  while (before < value && !largest.compare_exchange_weak(before, value)) {
  }
}

void fill_kv(const Input& input, HostTensors& data) {
  const Problem& p = input.problem;
  std::vector<std::vector<bool>> seen;
  if (input.is_hostile) seen = all_seen_keys(p, data.tensors());
  std::atomic<float> largest{0};
  const auto fill = [&](GuardedTensor& tensor, const Strides& stride, int64_t dim, Stream stream,
                        float mean) {
    for_each_row(p.batch, distinct(p.heads_kv, stride[1]), p.len_k, [&](RowIndex row) {
      const int64_t pair = row.batch_idx * p.heads_kv + row.head;
      const int64_t key = pair * p.len_k + row.idx;
      RowRandom poison(input.seed, kOfPoison, key);
      const bool is_seen =
          seen.empty() || seen[static_cast<size_t>(pair)][static_cast<size_t>(row.idx)];
      const bool is_nan = !is_seen || (input.has_visible_nan && poison.bits() % 16 == 0);
      const TensorRow to{tensor.data(), p.dtype_kv,
                         offset_of(stride, row.batch_idx, row.head, row.idx, 0), stride[3], dim};
      if (is_nan) return to.fill(is_seen || poison.bits() % 2 == 0 ? kNan : kInfinity);
      const float most = to.fill({input.seed, stream, key}, mean);
      if (stream == kOfV || data.v_is_k) raise_to(largest, most);
    });
  };
  fill(data.k, p.stride_k, p.dim_qk, kOfK, 0);
  if (!data.v_is_k) fill(data.v, p.stride_v, p.dim_v, kOfV, input.mean_v);
  data.largest_value = largest;
}

}  // namespace

void GuardedTensor::Release::operator()(std::byte* memory) const {
  ::operator delete(memory, kAlignment);
}

GuardedTensor::GuardedTensor(int64_t bytes, int64_t misaligned_by)
    : size_(bytes), misaligned_by_(misaligned_by) {
  const auto all = static_cast<size_t>(bytes + 2 * kGuardBytes + misaligned_by);
  memory_.reset(static_cast<std::byte*>(::operator new(all, kAlignment)));
  // On all cores: the first touch of a GB takes longer than many a run.
  constexpr size_t kPiece = size_t{4} << 20;
  parallel(default_executor(), static_cast<int32_t>((all + kPiece - 1) / kPiece), [&](int32_t i) {
    const size_t begin = static_cast<size_t>(i) * kPiece;
    std::fill_n(memory_.get() + begin, std::min(kPiece, all - begin), kPoison);
  });
}

bool GuardedTensor::guards_intact() const {
  if (memory_ == nullptr) return true;
  const auto is_poison = [](std::byte byte) { return byte == kPoison; };
  return std::all_of(all(), data(), is_poison) &&
         std::all_of(data() + size_, data() + size_ + kGuardBytes, is_poison);
}

uint64_t GuardedTensor::fingerprint() const {
  // Four lanes, so that one multiplication need not wait for the one before.
  uint64_t lanes[4] = {1, 2, 3, 4};
  const auto bytes = static_cast<size_t>(all_bytes());
  const size_t words = bytes / 8;
  for (size_t i = 0; i < words; ++i) {
    uint64_t word = 0;
    std::memcpy(&word, all() + 8 * i, 8);
    lanes[i % 4] = (lanes[i % 4] ^ word) * 0x9e3779b97f4a7c15u;
  }
  uint64_t result = 0;
  for (size_t i = 8 * words; i < bytes; ++i) {
    result = (result ^ static_cast<uint64_t>(all()[i])) * 0x100000001b3u;
  }
  for (const uint64_t lane : lanes) result = mix(result ^ lane);
  return result;
}

HostTensors::HostTensors(const Input& input)
    : problem(input.problem), v_is_k(input.v_is_k || input.problem.values_in_keys) {
  const Problem& p = problem;
  const TensorBytes bytes = tensor_bytes(p);
  const int64_t misaligned_by = misalignment(input);
  q = GuardedTensor(bytes.q, misaligned_by);
  k = GuardedTensor(bytes.k, misaligned_by);
  if (!v_is_k) v = GuardedTensor(bytes.v, misaligned_by);
  out = GuardedTensor(bytes.out, misaligned_by);
  if (p.wants_log_sum_exp) log_sum_exp = GuardedTensor(bytes.log_sum_exp, misaligned_by);
  if (p.has_sinks) {
    sinks = GuardedTensor(bytes.sinks, misaligned_by);
    RowRandom random(input.seed, kOfSinks, 0);
    for (int64_t h = 0; h < p.heads_q; ++h) {
      put(sinks.data(), Dtype::kF32, h,
          input.has_extreme_sinks ? extreme(random, Dtype::kF32) : random.normal());
    }
  }
  const auto copy = [&](const std::vector<int32_t>& from, GuardedTensor& to) {
    if (from.empty()) return;
    to = GuardedTensor(static_cast<int64_t>(from.size() * 4), misaligned_by);
    std::memcpy(to.data(), from.data(), from.size() * 4);
  };
  copy(input.key_lengths, key_lengths);
  copy(input.key_starts, key_starts);
  for_each_row(p.batch, p.heads_q, p.len_q, [&](RowIndex row) {
    const int64_t offset = offset_of(p.stride_q, row.batch_idx, row.head, row.idx, 0);
    const TensorRow to{q.data(), p.dtype_q, offset, p.stride_q[3], p.dim_qk};
    if (has_extreme_biases(input) && !masks_as_programs_do(row.idx)) return to.fill(0);
    to.fill({input.seed, kOfQ, offset}, 0);
  });
  fill_mask(input, *this);
  fill_kv(input, *this);
  if (!input.is_hostile) return;
  const int64_t bytes_out = bytes_of(p.dtype_out());
  if (p.batch * p.heads_q * p.len_q * p.dim_v * bytes_out < out.size()) {
    out_owned_.assign(static_cast<size_t>(out.size()), 0);
    for_each_row(p.batch, p.heads_q, p.len_q, [&](RowIndex row) {
      for (int64_t d = 0; d < p.dim_v; ++d) {
        const int64_t at = offset_of(p.stride_out, row.batch_idx, row.head, row.idx, d) * bytes_out;
        std::fill_n(out_owned_.begin() + at, bytes_out, uint8_t{1});
      }
    });
  }
  for (const Named& input : inputs()) fingerprints_.push_back(input.tensor->fingerprint());
}

std::vector<HostTensors::Named> HostTensors::inputs() const {
  return {{"q", &q},
          {"k", &k},
          {"v", &v},
          {"mask", &mask},
          {"sinks", &sinks},
          {"key_lengths", &key_lengths},
          {"key_starts", &key_starts}};
}

int64_t HostTensors::bytes() const {
  int64_t sum = out.size() + log_sum_exp.size();
  for (const Named& input : inputs()) sum += input.tensor->size();
  return sum;
}

Tensors HostTensors::tensors() const {
  const auto floats = [](const GuardedTensor& tensor) {
    return reinterpret_cast<float*>(tensor.data());
  };
  const auto ints = [](const GuardedTensor& tensor) {
    return reinterpret_cast<int32_t*>(tensor.data());
  };
  Tensors t;
  t.q = q.data();
  t.k = k.data();
  t.v = v_is_k ? k.data() : v.data();
  t.out = out.data();
  if (problem.mask != MaskKind::kNone) t.mask = mask.data();
  if (problem.has_sinks) t.sinks = floats(sinks);
  if (problem.has_key_lengths) t.key_lengths = ints(key_lengths);
  if (problem.has_key_starts) t.key_starts = ints(key_starts);
  if (problem.wants_log_sum_exp) t.log_sum_exp = floats(log_sum_exp);
  return t;
}

void HostTensors::poison_outputs() {
  std::fill_n(out.data(), out.size(), kPoison);
  std::fill_n(log_sum_exp.data(), log_sum_exp.size(), kPoison);
}

std::string HostTensors::damage() const {
  if (!out.guards_intact()) return "memory around out was written";
  if (problem.wants_log_sum_exp && !log_sum_exp.guards_intact()) {
    return "memory around log_sum_exp was written";
  }
  for (size_t i = 0; i < out_owned_.size(); ++i) {
    if (out_owned_[i] == 0 && out.data()[i] != kPoison) {
      return fmt::format("byte {} between the elements of out was written", i);
    }
  }
  const std::vector<Named> all = inputs();
  for (size_t i = 0; i < fingerprints_.size(); ++i) {
    if (all[i].tensor->fingerprint() != fingerprints_[i]) {
      return fmt::format("{}, or memory around it, was written: an input", all[i].name);
    }
  }
  return "";
}

}  // namespace wh
