#include "verify/host_tensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <optional>

#include "core/array_mask.h"
#include "core/key_rows.h"
#include "core/kv_tensor.h"
#include "core/sequence.h"
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
enum Stream : uint64_t { kOfQ, kOfK, kOfV, kOfMask, kOfSinks, kOfPoison, kOfScalesK, kOfScalesV };

struct TensorRow {
  std::byte* data;
  Dtype dtype;
  int64_t offset, stride, dim;

  // Answers with the largest |value|.
  float fill(RowRandom random, float mean, float times = 1) const {
    float largest = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const float value = times * (mean + random.normal());
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

void fill_extreme_query(const TensorRow& to, RowRandom random, RowIndex row) {
  constexpr float kSizes[] = {0x1p-40f, 1, 0x1p40f};
  to.fill(random, 0, kSizes[(row.idx + row.head) % 3]);
  const float odd = row.idx % 16 == 5 ? kInfinity : row.idx % 16 == 11 ? kNan : 0;
  if (odd != 0) put(to.data, to.dtype, to.offset + row.idx % to.dim * to.stride, odd);
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

// Which keys of one (sequence, kv head) any row of the group sees.
std::vector<bool> seen_keys(const Problem& p, const Tensors& t, const Sequence& sequence,
                            int64_t head_kv) {
  std::vector<bool> seen(static_cast<size_t>(p.len_k), false);
  if (p.mask == MaskKind::kNone) {
    // Ranges move to the right with the query, so that one begins where those before it ended.
    int64_t done = 0;
    for (int64_t i = 0; i < sequence.len_q; ++i) {
      const KeyRange keys = visible_keys(p, sequence, i);
      for (int64_t j = std::max(done, keys.begin); j < keys.end; ++j) {
        seen[static_cast<size_t>(j)] = true;
      }
      if (!keys.empty()) done = std::max(done, keys.end);
    }
    return seen;
  }
  for (int64_t g = 0; g < distinct(p.group(), p.stride_mask[1]); ++g) {
    for (int64_t i = 0; i < sequence.len_q; ++i) {
      const KeyRange keys = visible_keys(p, sequence, i);
      for (int64_t j = keys.begin; j < keys.end; ++j) {
        if (seen[static_cast<size_t>(j)]) continue;
        seen[static_cast<size_t>(j)] =
            mask_bias(p, t.mask, sequence.batch_idx, head_kv * p.group() + g, i, j) != -kInfinity;
      }
    }
  }
  return seen;
}

// Of every row of K and V as they are stored, by batch entry or page, kv head and token: whether
// some row of some sequence sees it. Heads that share memory (stride 0) must agree.
class SeenKeys {
 public:
  SeenKeys(const Problem& p, const Tensors& t)
      : heads_(p.heads_kv), storage_(key_storage(p)), seen_(size()) {
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence sequence = sequence_at(p, t, b);
      const KeyRows rows = key_rows(p, t, sequence);
      std::vector<bool> seen;
      for (int64_t h = 0; h < heads_; ++h) {
        // Without an array mask a key is every head's.
        if (h == 0 || p.mask != MaskKind::kNone) seen = seen_keys(p, t, sequence, h);
        for (size_t j = 0; j < seen.size(); ++j) {
          if (!seen[j]) continue;
          const auto [batch_idx, token] = rows.place(static_cast<int64_t>(j));
          seen_[index(batch_idx, h, token)] = true;
        }
      }
    }
    if (p.stride_k[1] == 0 || p.stride_v[1] == 0) share_heads();
  }

  bool at(const RowIndex& row) const { return seen_[index(row.batch_idx, row.head, row.idx)]; }

 private:
  size_t size() const { return static_cast<size_t>(storage_.batch * heads_ * storage_.length); }
  size_t index(int64_t batch_idx, int64_t head, int64_t token) const {
    return static_cast<size_t>((batch_idx * heads_ + head) * storage_.length + token);
  }
  void share_heads() {
    for (int64_t b = 0; b < storage_.batch; ++b) {
      for (int64_t i = 0; i < storage_.length; ++i) {
        bool any = false;
        for (int64_t h = 0; h < heads_; ++h) any = any || seen_[index(b, h, i)];
        for (int64_t h = 0; h < heads_; ++h) seen_[index(b, h, i)] = any;
      }
    }
  }

  int64_t heads_;
  Storage storage_;
  std::vector<bool> seen_;
};

void raise_to(std::atomic<float>& largest, float value) {
  float before = largest;
  while (before < value && !largest.compare_exchange_weak(before, value)) {
  }
}

// Of a tensor of about N(mean, 1): different enough that a scale of something else shows. What is
// beyond the highest code becomes it.
void fill_scales(const Input& input, const KvTensor& tensor, Stream stream, float* scales) {
  const Problem& p = input.problem;
  const auto extents = scales_extents(p, tensor.scales, tensor.dim);
  const float highest = tensor.format == Quantised::kE4m3 ? kHighestE4m3 : kHighestInt8;
  const Strides& stride = tensor.stride_scales;
  for_each_row(extents[0], extents[1], extents[2], [&](RowIndex row) {
    for (int64_t d = 0; d < extents[3]; ++d) {
      const int64_t at =
          row.batch_idx * stride[0] + row.head * stride[1] + row.idx * stride[2] + d * stride[3];
      RowRandom random(input.seed, stream, at);
      const auto share = static_cast<float>(random.bits() % 1024) / 1024;
      scales[at] = (3 + 2 * share + std::fabs(input.mean_v)) / highest;
    }
  });
}

// A row of K or V that is not elements of a type: codes, by scales of its own where it has one.
struct QuantisedRow {
  const KvTensor& tensor;
  KvPlace place;

  // Answers with the largest |value| that comes back.
  float fill(RowRandom random, float mean) const {
    std::vector<float> values(static_cast<size_t>(tensor.dim));
    for (float& value : values) value = mean + random.normal();
    if (tensor.scales == Scales::kTokenHead) {
      const float scale = scale_of_row(values.data(), tensor.dim, tensor.format);
      const_cast<float*>(tensor.scales_data)[tensor.scale_offset(place)] = scale;
    }
    std::vector<float> scales;
    for (int64_t d = 0; d < tensor.dim; ++d) scales.push_back(tensor.scale(place, d));
    std::vector<std::byte> codes(static_cast<size_t>(tensor.bytes(tensor.dim)));
    quantise_row(values.data(), tensor.dim, tensor.format, scales.data(), 1, codes.data());
    const auto size = static_cast<int64_t>(codes.size());
    const int64_t step = is_block_format(tensor.format) ? 1 : tensor.stride[3];
    for (int64_t i = 0; i < size; ++i) bytes()[i * step] = codes[static_cast<size_t>(i)];
    float largest = 0;
    for (int64_t d = 0; d < tensor.dim; ++d) {
      largest = std::max(largest, std::fabs(tensor.element(place, d)));
    }
    return largest;
  }
  // NaN, or for int8 whose scale is not the row's own, which has none, its lowest code.
  void poison() const {
    if (tensor.scales == Scales::kTokenHead) {
      const_cast<float*>(tensor.scales_data)[tensor.scale_offset(place)] = kNan;
    }
    const bool is_int8 = tensor.format == Quantised::kInt8;
    const int64_t step = is_block_format(tensor.format) ? 1 : tensor.stride[3];
    for (int64_t i = 0; i < tensor.bytes(tensor.dim); ++i) {
      bytes()[i * step] = is_int8 ? std::byte{0x80} : kPoison;
    }
  }

 private:
  std::byte* bytes() const {
    return const_cast<std::byte*>(static_cast<const std::byte*>(tensor.data)) +
           tensor.bytes(tensor.offset(place));
  }
};

void fill_kv(const Input& input, HostTensors& data) {
  const Problem& p = input.problem;
  const Storage storage = key_storage(p);
  std::optional<SeenKeys> seen;
  if (input.is_hostile) seen.emplace(p, data.tensors());
  std::atomic<float> largest{0};
  const auto fill = [&](GuardedTensor& tensor, const KvTensor& stored, Stream stream, float mean) {
    const Strides& stride = stored.stride;
    if (stored.scales != Scales::kNone) {
      fill_scales(input, stored, stream == kOfK ? kOfScalesK : kOfScalesV,
                  const_cast<float*>(stored.scales_data));
    }
    for_each_row(storage.batch, distinct(p.heads_kv, stride[1]), storage.length, [&](RowIndex row) {
      const int64_t key = (row.batch_idx * p.heads_kv + row.head) * storage.length + row.idx;
      RowRandom poison(input.seed, kOfPoison, key);
      const bool is_seen = !seen || seen->at(row);
      const bool is_nan = !is_seen || (input.has_visible_nan && poison.bits() % 16 == 0);
      if (stored.format != Quantised::kNone) {
        // Of a page that sequences share, codes by the first one's scales do as well as any.
        const int64_t sequence = p.key_layout == KeyLayout::kDense ? row.batch_idx : 0;
        const QuantisedRow to{stored, {row.batch_idx, row.head, row.idx, sequence}};
        if (is_nan) return to.poison();
        const float most = to.fill({input.seed, stream, key}, mean);
        if (stream == kOfV || data.v_is_k) raise_to(largest, most);
        return;
      }
      const TensorRow to{tensor.data(), p.dtype_kv,
                         offset_of(stride, row.batch_idx, row.head, row.idx, 0), stride[3],
                         stored.dim};
      if (is_nan) return to.fill(is_seen || poison.bits() % 2 == 0 ? kNan : kInfinity);
      const float most = to.fill({input.seed, stream, key}, mean);
      if (stream == kOfV || data.v_is_k) raise_to(largest, most);
    });
  };
  fill(data.k, keys_of(p, data.tensors()), kOfK, 0);
  if (!data.v_is_k) fill(data.v, values_of(p, data.tensors()), kOfV, input.mean_v);
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
  fill_bytes(memory_.get(), all, kPoison);
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
  if (p.scales_k != Scales::kNone) scales_k = GuardedTensor(bytes.scales_k, misaligned_by);
  if (p.scales_v != Scales::kNone && !v_is_k) {
    scales_v = GuardedTensor(bytes.scales_v, misaligned_by);
  }
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
  copy(input.query_offsets, query_offsets);
  copy(input.key_offsets, key_offsets);
  copy(input.page_table, page_table);
  copy(input.page_offsets, page_offsets);
  const Storage queries = query_storage(p);
  for_each_row(queries.batch, p.heads_q, queries.length, [&](RowIndex row) {
    const int64_t offset = offset_of(p.stride_q, row.batch_idx, row.head, row.idx, 0);
    const TensorRow to{q.data(), p.dtype_q, offset, p.stride_q[3], p.dim_qk};
    if (has_extreme_biases(input) && !masks_as_programs_do(row.idx)) return to.fill(0);
    const RowRandom random(input.seed, kOfQ, offset);
    if (input.has_extreme_queries) return fill_extreme_query(to, random, row);
    to.fill(random, 0);
  });
  fill_mask(input, *this);
  fill_kv(input, *this);
  if (!input.is_hostile) return;
  find_owned_bytes();
  for (const Named& input : inputs()) fingerprints_.push_back(input.tensor->fingerprint());
}

// All of them, where rows lie side by side and each is a sequence's.
void HostTensors::find_owned_bytes() {
  const Problem& p = problem;
  const int64_t bytes_out = bytes_of(p.dtype_out()), rows = query_rows(p, tensors());
  if (rows * p.dim_v * bytes_out == out.size()) return;
  out_owned_.assign(static_cast<size_t>(out.size()), 0);
  for_each_row(1, 1, rows, [&](RowIndex row) {
    const QueryRow at = query_row(p, row.idx);
    for (int64_t d = 0; d < p.dim_v; ++d) {
      const int64_t begin =
          offset_of(p.stride_out, at.query_batch, at.head_q, at.query_idx, d) * bytes_out;
      std::fill_n(out_owned_.begin() + begin, bytes_out, uint8_t{1});
    }
  });
}

std::vector<HostTensors::Named> HostTensors::inputs() const {
  return {{"q", &q},
          {"k", &k},
          {"v", &v},
          {"scales_k", &scales_k},
          {"scales_v", &scales_v},
          {"mask", &mask},
          {"sinks", &sinks},
          {"key_lengths", &key_lengths},
          {"key_starts", &key_starts},
          {"query_offsets", &query_offsets},
          {"key_offsets", &key_offsets},
          {"page_table", &page_table},
          {"page_offsets", &page_offsets}};
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
  if (problem.scales_k != Scales::kNone) t.scales_k = floats(scales_k);
  if (problem.scales_v != Scales::kNone) t.scales_v = floats(v_is_k ? scales_k : scales_v);
  if (problem.has_sinks) t.sinks = floats(sinks);
  if (problem.has_key_lengths) t.key_lengths = ints(key_lengths);
  if (problem.has_key_starts) t.key_starts = ints(key_starts);
  if (problem.wants_log_sum_exp) t.log_sum_exp = floats(log_sum_exp);
  if (problem.query_layout == QueryLayout::kPacked) t.query_offsets = ints(query_offsets);
  if (problem.key_layout == KeyLayout::kPacked) t.key_offsets = ints(key_offsets);
  if (problem.key_layout == KeyLayout::kPaged) t.page_table = ints(page_table);
  if (problem.has_page_offsets) t.page_offsets = ints(page_offsets);
  return t;
}

void HostTensors::poison_outputs() {
  for (GuardedTensor* one : {&out, &log_sum_exp}) {
    fill_bytes(one->data(), static_cast<size_t>(one->size()), kPoison);
  }
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
  if (problem.query_layout == QueryLayout::kPacked && problem.wants_log_sum_exp) {
    for (int64_t i = query_rows(problem, tensors()) * 4; i < log_sum_exp.size(); ++i) {
      if (log_sum_exp.data()[i] == kPoison) continue;
      return fmt::format("log_sum_exp of row {}, which is no sequence's, was written", i / 4);
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
