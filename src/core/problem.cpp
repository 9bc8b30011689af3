#include "core/problem.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/layout_checks.h"
#include "core/problem_fields.h"

namespace wh {
namespace {

int64_t saturating_product(int64_t a, int64_t b) {
  int64_t result = 0;
  return __builtin_mul_overflow(a, b, &result) ? std::numeric_limits<int64_t>::max() : result;
}

Strides stepped_strides(const Extents& extents, Strides strides) {
  for (int i = 3; i >= 0; --i) {
    if (is_stepped_over(extents[i])) continue;
    strides[i] =
        i == 3 ? 1 : saturating_product(strides[i + 1], std::max<int64_t>(1, extents[i + 1]));
  }
  return strides;
}

struct Bytes {
  const char* name;
  const void* data;
  int64_t size;
  int64_t element_bytes;  // what its address must be a multiple of
};

bool overlap(const Bytes& a, const Bytes& b) {
  if (a.data == nullptr || b.data == nullptr || a.size == 0 || b.size == 0) return false;
  const auto begin_a = reinterpret_cast<uintptr_t>(a.data);
  const auto begin_b = reinterpret_cast<uintptr_t>(b.data);
  return begin_a < begin_b + b.size && begin_b < begin_a + a.size;
}

std::string place(const Bytes& bytes) {
  return fmt::format("{}, {} bytes at {}", bytes.name, bytes.size, bytes.data);
}

Status check_apart(const Bytes& written, const Bytes& other) {
  if (!overlap(written, other)) return {};
  return invalid(
      fmt::format("{} overlaps {} ({}; {}); what a run writes must share no memory with "
                  "another tensor",
                  written.name, other.name, place(written), place(other)));
}

Status check_alignment(const Bytes& bytes) {
  if (bytes.element_bytes == 0) return {};
  if (reinterpret_cast<uintptr_t>(bytes.data) % static_cast<uintptr_t>(bytes.element_bytes) == 0) {
    return {};
  }
  return invalid(fmt::format("{} is at {}; it must be aligned to its elements of {} bytes",
                             bytes.name, bytes.data, bytes.element_bytes));
}

Extents extents_q(const Problem& p) { return {p.batch, p.heads_q, p.len_q, p.dim_qk}; }
Extents extents_k(const Problem& p) { return {p.batch, p.heads_kv, p.len_k, p.dim_qk}; }
Extents extents_v(const Problem& p) { return {p.batch, p.heads_kv, p.len_k, p.dim_v}; }
Extents extents_out(const Problem& p) { return {p.batch, p.heads_q, p.len_q, p.dim_v}; }
Extents extents_mask(const Problem& p) { return {p.batch, p.heads_q, p.len_q, p.len_k}; }

Status validate_gradients(const Problem& p) {
  WH_RETURN_IF_ERROR(check_strides("stride_d_out", extents_out(p), p.stride_d_out));
  WH_RETURN_IF_ERROR(check_strides("stride_dq", extents_q(p), p.stride_dq));
  WH_RETURN_IF_ERROR(check_distinct("dq", extents_q(p), p.stride_dq));
  WH_RETURN_IF_ERROR(check_strides("stride_dk", extents_k(p), p.stride_dk));
  WH_RETURN_IF_ERROR(check_distinct("dk", extents_k(p), p.stride_dk));
  if (p.values_in_keys) return {};  // no dv
  WH_RETURN_IF_ERROR(check_strides("stride_dv", extents_v(p), p.stride_dv));
  return check_distinct("dv", extents_v(p), p.stride_dv);
}

}  // namespace

int64_t mask_element_bytes(const Problem& problem) {
  switch (problem.mask) {
    case MaskKind::kNone:
      return 0;
    case MaskKind::kBoolean:
      return 1;
    case MaskKind::kAdditiveF32:
      return 4;
    case MaskKind::kAdditiveQ:
      return static_cast<int64_t>(dtype_bytes(problem.dtype_q));
  }
  return 0;
}

Strides dense_strides(int64_t heads, int64_t length, int64_t dim) {
  const int64_t head = saturating_product(length, dim);
  return {saturating_product(heads, head), head, dim, 1};
}

Problem canonical(Problem p) {
  p.stride_q = stepped_strides(extents_q(p), p.stride_q);
  p.stride_k = stepped_strides(extents_k(p), p.stride_k);
  p.stride_v = p.values_in_keys ? p.stride_k : stepped_strides(extents_v(p), p.stride_v);
  p.stride_out = stepped_strides(extents_out(p), p.stride_out);
  p.stride_mask =
      p.mask == MaskKind::kNone ? Strides{} : stepped_strides(extents_mask(p), p.stride_mask);
  const bool is_backward = p.pass == Pass::kBackward;
  const auto of_gradient = [&](const Extents& extents, const Strides& strides) {
    return is_backward ? stepped_strides(extents, strides) : Strides{};
  };
  p.stride_d_out = of_gradient(extents_out(p), p.stride_d_out);
  p.stride_dq = of_gradient(extents_q(p), p.stride_dq);
  p.stride_dk = of_gradient(extents_k(p), p.stride_dk);
  p.stride_dv = p.values_in_keys ? Strides{} : of_gradient(extents_v(p), p.stride_dv);
  return p;
}

void set_dense(Problem& p) {
  p.stride_q = dense_strides(p.heads_q, p.len_q, p.dim_qk);
  p.stride_k = dense_strides(p.heads_kv, p.len_k, p.dim_qk);
  p.stride_v = p.values_in_keys ? p.stride_k : dense_strides(p.heads_kv, p.len_k, p.dim_v);
  p.stride_out = dense_strides(p.heads_q, p.len_q, p.dim_v);
  p.scale = 1 / std::sqrt(static_cast<float>(p.dim_qk));
}

TensorBytes tensor_bytes(const Problem& p) {
  const auto bytes_q = static_cast<int64_t>(dtype_bytes(p.dtype_q));
  const auto bytes_kv = static_cast<int64_t>(dtype_bytes(p.dtype_kv));
  TensorBytes bytes;
  bytes.q = span_elements(extents_q(p), p.stride_q) * bytes_q;
  bytes.k = span_elements(extents_k(p), p.stride_k) * bytes_kv;
  if (!p.values_in_keys) bytes.v = span_elements(extents_v(p), p.stride_v) * bytes_kv;
  const auto bytes_out = static_cast<int64_t>(dtype_bytes(p.dtype_out()));
  bytes.out = span_elements(extents_out(p), p.stride_out) * bytes_out;
  if (p.mask != MaskKind::kNone) {
    bytes.mask = span_elements(extents_mask(p), p.stride_mask) * mask_element_bytes(p);
  }
  if (p.has_sinks) bytes.sinks = p.heads_q * 4;
  if (p.has_key_lengths) bytes.key_lengths = p.batch * 4;
  if (p.has_key_starts) bytes.key_starts = p.batch * 4;
  const bool is_backward = p.pass == Pass::kBackward;
  if (p.wants_log_sum_exp || is_backward) bytes.log_sum_exp = p.batch * p.heads_q * p.len_q * 4;
  if (!is_backward) return bytes;
  bytes.d_out = span_elements(extents_out(p), p.stride_d_out) * bytes_q;
  bytes.dq = span_elements(extents_q(p), p.stride_dq) * bytes_q;
  bytes.dk = span_elements(extents_k(p), p.stride_dk) * bytes_kv;
  if (!p.values_in_keys) bytes.dv = span_elements(extents_v(p), p.stride_dv) * bytes_kv;
  if (p.has_sinks) bytes.d_sinks = p.heads_q * 4;
  return bytes;
}

Status validate(const Problem& p) {
  WH_RETURN_IF_ERROR(check_fields(p));
  if (p.heads_q % p.heads_kv != 0) {
    return invalid(fmt::format("heads_q is {}; it must be a multiple of heads_kv, which is {}",
                               p.heads_q, p.heads_kv));
  }
  WH_RETURN_IF_ERROR(check_strides("stride_q", extents_q(p), p.stride_q));
  WH_RETURN_IF_ERROR(check_strides("stride_k", extents_k(p), p.stride_k));
  WH_RETURN_IF_ERROR(check_strides("stride_v", extents_v(p), p.stride_v));
  if (p.values_in_keys && p.dim_v > p.dim_qk) {
    return invalid(fmt::format("dim_v is {}; as v lies in k it must be at most dim_qk, which is {}",
                               p.dim_v, p.dim_qk));
  }
  for (size_t i = 0; p.values_in_keys && i < 4; ++i) {
    if (!is_stepped_over(extents_v(p)[i]) || p.stride_v[i] == p.stride_k[i]) continue;
    return invalid(fmt::format("stride_v[{}] is {}; as v lies in k it must be stride_k[{}], {}", i,
                               p.stride_v[i], i, p.stride_k[i]));
  }
  WH_RETURN_IF_ERROR(check_strides("stride_out", extents_out(p), p.stride_out));
  WH_RETURN_IF_ERROR(check_distinct("out", extents_out(p), p.stride_out));
  if (p.pass == Pass::kBackward) {
    if (p.f32_out) return invalid("f32_out is true; it must be false in the backward pass");
    WH_RETURN_IF_ERROR(validate_gradients(p));
  }
  if (p.mask != MaskKind::kNone) {
    WH_RETURN_IF_ERROR(check_strides("stride_mask", extents_mask(p), p.stride_mask));
  }
  const __int128 rows = static_cast<__int128>(p.batch) * p.heads_q * p.len_q;
  if (rows * p.dim_v > std::numeric_limits<int64_t>::max() / 16) {
    return invalid("batch * heads_q * len_q * dim_v overflows a 64-bit byte offset");
  }
  return {};
}

Status validate(const Problem& p, const Tensors& t) {
  const TensorBytes bytes = tensor_bytes(p);
  const auto element_q = static_cast<int64_t>(dtype_bytes(p.dtype_q));
  const auto element_kv = static_cast<int64_t>(dtype_bytes(p.dtype_kv));
  const bool is_backward = p.pass == Pass::kBackward;
  const auto element_out = static_cast<int64_t>(dtype_bytes(p.dtype_out()));
  const Bytes out{"out", t.out, bytes.out, element_out};
  const Bytes lse{"log_sum_exp", t.log_sum_exp, bytes.log_sum_exp, 4};
  const Bytes none{"", nullptr, 0, 0};
  // What a run writes shares memory with nothing else.
  const Bytes outputs[] = {
      is_backward ? none : out,           is_backward ? none : lse,
      {"dq", t.dq, bytes.dq, element_q},  {"dk", t.dk, bytes.dk, element_kv},
      {"dv", t.dv, bytes.dv, element_kv}, {"d_sinks", t.d_sinks, bytes.d_sinks, 4}};
  const Bytes inputs[] = {{"q", t.q, bytes.q, element_q},
                          {"k", t.k, bytes.k, element_kv},
                          {"v", t.v, bytes.v, element_kv},
                          {"mask", t.mask, bytes.mask, mask_element_bytes(p)},
                          {"sinks", t.sinks, bytes.sinks, 4},
                          {"key_lengths", t.key_lengths, bytes.key_lengths, 4},
                          {"key_starts", t.key_starts, bytes.key_starts, 4},
                          is_backward ? out : none,
                          is_backward ? lse : none,
                          {"d_out", t.d_out, bytes.d_out, element_q}};
  if (!writes_anything(p)) return {};  // nothing is read either
  for (const Bytes& output : outputs) {
    if (output.size == 0) continue;
    if (output.data == nullptr) {
      return invalid(
          fmt::format("{} is null; it must point to where the result goes", output.name));
    }
    WH_RETURN_IF_ERROR(check_alignment(output));
  }
  for (const Bytes& input : inputs) {
    if (input.size == 0) continue;
    if (input.data == nullptr) {
      return invalid(fmt::format("{} is null; the problem says that it is used", input.name));
    }
    WH_RETURN_IF_ERROR(check_alignment(input));
  }
  if (p.values_in_keys && t.v != nullptr && t.v != t.k) {
    return invalid(fmt::format(
        "v is {}; the problem says that it lies in k, so it must be null or k, which is {}", t.v,
        t.k));
  }
  const Bytes workspace{"workspace", t.workspace, static_cast<int64_t>(t.workspace_bytes), 0};
  for (const Bytes& input : inputs) WH_RETURN_IF_ERROR(check_apart(workspace, input));
  for (size_t i = 0; i < std::size(outputs); ++i) {
    for (const Bytes& input : inputs) WH_RETURN_IF_ERROR(check_apart(outputs[i], input));
    for (size_t j = 0; j < i; ++j) WH_RETURN_IF_ERROR(check_apart(outputs[j], outputs[i]));
    WH_RETURN_IF_ERROR(check_apart(outputs[i], workspace));
  }
  return {};
}

Status validate_key_ranges(const Problem& p, const Tensors& t) {
  if (!writes_anything(p)) return {};  // and nothing is read: they may be null
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.has_key_lengths && (t.key_lengths[b] < 0 || t.key_lengths[b] > p.len_k)) {
      return invalid(fmt::format("key_lengths[{}] is {}; it must be between 0 and len_k, {}", b,
                                 t.key_lengths[b], p.len_k));
    }
    if (p.has_key_starts && t.key_starts[b] < 0) {
      return invalid(
          fmt::format("key_starts[{}] is {}; it must not be negative", b, t.key_starts[b]));
    }
  }
  return {};
}

bool writes_anything(const Problem& p) {
  const TensorBytes bytes = tensor_bytes(p);
  if (p.pass == Pass::kForward) return bytes.out > 0;
  return bytes.dq > 0 || bytes.dk > 0 || bytes.dv > 0 || bytes.d_sinks > 0;
}

std::string describe(const Problem& p) {
  std::string text;
  if (p.pass == Pass::kBackward) text += "backward, ";
  if (p.batch != 1) text += fmt::format("batch {}, ", p.batch);
  text += fmt::format("{}/{} heads, dim {}", p.heads_q, p.heads_kv, p.dim_qk);
  if (p.dim_v != p.dim_qk) text += fmt::format("/{}", p.dim_v);
  text += fmt::format(", {} x {}, {}", p.len_q, p.len_k, kDtypes.name(p.dtype_q));
  if (p.dtype_kv != p.dtype_q) text += fmt::format(" over {}", kDtypes.name(p.dtype_kv));
  if (p.causal == Causal::kBottomRight) text += ", causal";
  if (p.causal == Causal::kTopLeft) text += ", causal top-left";
  if (p.window_left != kUnlimited || p.window_right != kUnlimited) {
    auto side = [](int64_t w) { return w == kUnlimited ? std::string("all") : std::to_string(w); };
    text += fmt::format(", window {},{}", side(p.window_left), side(p.window_right));
  }
  if (p.softcap > 0) text += fmt::format(", softcap {}", p.softcap);
  if (p.mask == MaskKind::kBoolean) text += ", boolean mask";
  if (p.mask == MaskKind::kAdditiveF32 || p.mask == MaskKind::kAdditiveQ) text += ", additive mask";
  if (p.has_sinks) text += ", sinks";
  if (p.has_key_lengths) text += ", key lengths";
  if (p.has_key_starts) text += ", key starts";
  if (p.values_in_keys) text += ", values in keys";
  if (p.f32_out) text += ", f32 out";
  return text;
}

}  // namespace wh
