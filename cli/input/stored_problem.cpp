#include "input/stored_problem.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <cstring>

#include "core/names.h"

namespace wh::cli {
namespace {

std::optional<Dtype> dtype_of(const std::string& stored) {
  if (stored == "F32") return Dtype::kF32;
  if (stored == "F16") return Dtype::kF16;
  if (stored == "BF16") return Dtype::kBf16;
  return std::nullopt;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

// Reads a file's tensors into a StoredProblem and remembers the first thing that was wrong.
class ProblemFileReader {
 public:
  ProblemFileReader(const SafetensorsView& view, const ProblemFlags& options)
      : view_(view), options_(options) {}

  Status read(StoredProblem& stored) {
    Problem& p = stored.request.problem;
    const StoredTensor* q = tensor4("q");
    const StoredTensor* k = tensor4("k");
    const StoredTensor* v = tensor4("v");
    if (!status_.ok()) return status_;
    p.batch = q->shape[0];
    p.heads_q = q->shape[1];
    p.len_q = q->shape[2];
    p.dim_qk = q->shape[3];
    p.heads_kv = k->shape[1];
    p.len_k = k->shape[2];
    p.dim_v = v->shape[3];
    expect(k->shape, {p.batch, p.heads_kv, p.len_k, p.dim_qk}, "k");
    expect(v->shape, {p.batch, p.heads_kv, p.len_k, p.dim_v}, "v");
    p.dtype_q = dtype("q", *q);
    p.dtype_kv = dtype("k", *k);
    if (dtype("v", *v) != p.dtype_kv) fail("v has another type than k");
    p.stride_q = dense_strides(p.heads_q, p.len_q, p.dim_qk);
    p.stride_k = dense_strides(p.heads_kv, p.len_k, p.dim_qk);
    p.stride_v = dense_strides(p.heads_kv, p.len_k, p.dim_v);
    p.stride_out = dense_strides(p.heads_q, p.len_q, p.dim_v);
    Tensors& t = stored.tensors;
    t.q = q->bytes.data();
    t.k = k->bytes.data();
    t.v = v->bytes.data();
    read_mask(p, t);
    if (const StoredTensor* sinks = optional("sinks", "F32", {p.heads_q})) {
      p.has_sinks = true;
      t.sinks = reinterpret_cast<const float*>(sinks->bytes.data());
    }
    read_ints("key_lengths", p, stored.request.key_lengths);
    read_ints("key_starts", p, stored.request.key_starts);
    p.has_key_lengths = !stored.request.key_lengths.empty();
    p.has_key_starts = !stored.request.key_starts.empty();
    if (const auto* out = optional("out", "F32", {p.batch, p.heads_q, p.len_q, p.dim_v})) {
      stored.out = *out;
    }
    if (const auto* lse = optional("log_sum_exp", "F32", {p.batch, p.heads_q, p.len_q})) {
      stored.log_sum_exp = *lse;
      p.wants_log_sum_exp = true;
    }
    read_metadata(p);
    if (status_.ok()) status_ = override_options(options_, p);
    if (!status_.ok()) return status_;
    return validate(p);
  }

 private:
  void fail(const std::string& message) {
    if (status_.ok()) status_ = invalid(message);
  }
  void expect(const std::vector<int64_t>& shape, const std::vector<int64_t>& wanted,
              const char* name) {
    if (shape != wanted) {
      fail(fmt::format("{} is {}; the other tensors make it {}", name, shape_text(shape),
                       shape_text(wanted)));
    }
  }
  const StoredTensor* find(const char* name) const {
    const auto found = view_.tensors.find(name);
    return found == view_.tensors.end() ? nullptr : &found->second;
  }
  const StoredTensor* tensor4(const char* name) {
    const StoredTensor* tensor = find(name);
    if (tensor == nullptr) {
      fail(fmt::format("the file has no tensor \"{}\"; it must have q, k and v", name));
    } else if (tensor->shape.size() != 4) {
      fail(fmt::format("{} is {}; it must be [batch, heads, length, dim]", name,
                       shape_text(tensor->shape)));
    }
    return tensor;
  }
  const StoredTensor* optional(const char* name, const char* dtype,
                               const std::vector<int64_t>& shape) {
    const StoredTensor* tensor = find(name);
    if (tensor == nullptr) return nullptr;
    expect(tensor->shape, shape, name);
    if (tensor->dtype != dtype) {
      fail(fmt::format("{} is {}; it must be {}", name, tensor->dtype, dtype));
    }
    return tensor;
  }
  Dtype dtype(const char* name, const StoredTensor& tensor) {
    const auto type = dtype_of(tensor.dtype);
    if (!type) fail(fmt::format("{} is {}; it must be F32, F16 or BF16", name, tensor.dtype));
    return type.value_or(Dtype::kF32);
  }
  void read_ints(const char* name, const Problem& p, std::vector<int32_t>& to) {
    const StoredTensor* tensor = optional(name, "I32", {p.batch});
    if (tensor == nullptr || !status_.ok()) return;
    to.resize(static_cast<size_t>(p.batch));
    std::memcpy(to.data(), tensor->bytes.data(), tensor->bytes.size());
  }
  void read_mask(Problem& p, Tensors& t) {
    const StoredTensor* mask = find("mask");
    if (mask == nullptr) return;
    if (mask->shape.size() != 4) {
      return fail(fmt::format("mask is {}; it must be [batch, heads, queries, keys], 1 broadcasts",
                              shape_text(mask->shape)));
    }
    const int64_t full[] = {p.batch, p.heads_q, p.len_q, p.len_k};
    p.stride_mask = dense_strides(mask->shape[1], mask->shape[2], mask->shape[3]);
    for (size_t i = 0; i < 4; ++i) {
      const int64_t size = mask->shape[i];
      if (size != full[i] && size != 1) {
        return fail(fmt::format("mask is {}; size {} must be 1 or {}", shape_text(mask->shape), i,
                                full[i]));
      }
      if (size == 1) p.stride_mask[i] = 0;
    }
    const auto type = dtype_of(mask->dtype);
    if (mask->dtype == "BOOL" || mask->dtype == "U8") {
      p.mask = MaskKind::kBoolean;
    } else if (type == Dtype::kF32) {
      p.mask = MaskKind::kAdditiveF32;
    } else if (type == p.dtype_q) {
      p.mask = MaskKind::kAdditiveQ;
    } else {
      return fail(fmt::format("mask is {}; it must be BOOL, U8, F32 or q's type", mask->dtype));
    }
    t.mask = mask->bytes.data();
  }
  void read_metadata(Problem& p) {
    p.scale = number("scale", 1 / std::sqrt(static_cast<float>(std::max<int64_t>(1, p.dim_qk))));
    p.softcap = number("softcap", 0);
    p.window_left = integer("window_left", kUnlimited);
    p.window_right = integer("window_right", kUnlimited);
    const auto causal = view_.metadata.find("causal");
    if (causal == view_.metadata.end()) return;
    std::string name = causal->second;
    std::replace(name.begin(), name.end(), '_', '-');
    const auto value = kCausals.value(name);
    if (!value) fail(fmt::format("metadata causal is \"{}\"; valid: {}", name, kCausals.list()));
    p.causal = value.value_or(Causal::kNone);
  }
  int64_t integer(const char* name, int64_t missing) {
    const auto found = view_.metadata.find(name);
    if (found == view_.metadata.end()) return missing;
    const std::string& text = found->second;
    int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size()) {
      fail(
          fmt::format("metadata {} is \"{}\"; it must be an integer, -1 for no limit", name, text));
    }
    return value;
  }
  float number(const char* name, float missing) {
    const auto found = view_.metadata.find(name);
    if (found == view_.metadata.end()) return missing;
    char* end = nullptr;
    const float value = std::strtof(found->second.c_str(), &end);
    if (*end != '\0' || found->second.empty()) {
      fail(fmt::format("metadata {} is \"{}\"; it must be a number", name, found->second));
    }
    return value;
  }

  const SafetensorsView& view_;
  const ProblemFlags& options_;
  Status status_;
};

// Kernels read elements where they lie, but a file may place them anywhere.
template <typename T>
void copy_if_misaligned(const SafetensorsView& view, const char* name, const T*& data,
                        StoredProblem& stored) {
  const auto found = view.tensors.find(name);
  if (found == view.tensors.end() || reinterpret_cast<uintptr_t>(data) % 8 == 0) return;
  const auto bytes = found->second.bytes;
  const GuardedTensor& copy = stored.buffers.emplace_back(static_cast<int64_t>(bytes.size()));
  std::memcpy(copy.data(), bytes.data(), bytes.size());
  data = reinterpret_cast<const T*>(copy.data());
}

}  // namespace

Result<StoredProblem> read_problem(const SafetensorsView& view, const ProblemFlags& options) {
  StoredProblem stored;
  WH_RETURN_IF_ERROR(ProblemFileReader(view, options).read(stored));
  Tensors& t = stored.tensors;
  copy_if_misaligned(view, "q", t.q, stored);
  copy_if_misaligned(view, "k", t.k, stored);
  copy_if_misaligned(view, "v", t.v, stored);
  copy_if_misaligned(view, "mask", t.mask, stored);
  copy_if_misaligned(view, "sinks", t.sinks, stored);
  const Request& request = stored.request;
  if (!request.key_lengths.empty()) t.key_lengths = request.key_lengths.data();
  if (!request.key_starts.empty()) t.key_starts = request.key_starts.data();
  const TensorBytes bytes = tensor_bytes(request.problem);
  t.out = stored.buffers.emplace_back(bytes.out).data();
  if (request.problem.wants_log_sum_exp) {
    t.log_sum_exp = reinterpret_cast<float*>(stored.buffers.emplace_back(bytes.log_sum_exp).data());
  }
  return stored;
}

Result<StoredProblem> read_problem_file(const std::string& path, const ProblemFlags& options) {
  Result<MappedFile> file = MappedFile::open(path);
  if (!file.ok()) return file.status();
  const Result<SafetensorsView> view = parse_safetensors(file->bytes());
  if (!view.ok()) return invalid(path + ": " + view.status().message());
  Result<StoredProblem> stored = read_problem(*view, options);
  if (!stored.ok()) return invalid(path + ": " + stored.status().message());
  stored->file = std::move(*file);
  return stored;
}

}  // namespace wh::cli
