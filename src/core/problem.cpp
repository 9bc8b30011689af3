#include "core/problem.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/layout_checks.h"
#include "core/problem_fields.h"
#include "core/quantised.h"

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

Extents extents_of(Storage storage, int64_t heads, int64_t dim) {
  return {storage.batch, heads, storage.length, dim};
}
Extents extents_q(const Problem& p) { return extents_of(query_storage(p), p.heads_q, p.dim_qk); }
Extents extents_k(const Problem& p) { return extents_of(key_storage(p), p.heads_kv, p.dim_qk); }
Extents extents_v(const Problem& p) { return extents_of(key_storage(p), p.heads_kv, p.dim_v); }
Extents extents_out(const Problem& p) { return extents_of(query_storage(p), p.heads_q, p.dim_v); }
Extents extents_mask(const Problem& p) { return {p.batch, p.heads_q, p.len_q, p.len_k}; }

// K or V: what is said of each of them.
struct Quantisation {
  const char* letter;
  Quantised format;
  Scales scales;
  const Strides& stride_scales;
  const Strides& stride;
  Extents extents;  // of the tensor
};
Quantisation quantisation_k(const Problem& p) {
  return {"k", p.quantised_k, p.scales_k, p.stride_scales_k, p.stride_k, extents_k(p)};
}
Quantisation quantisation_v(const Problem& p) {
  return {"v", p.quantised_v, p.scales_v, p.stride_scales_v, p.stride_v, extents_v(p)};
}

Status validate_quantised(const Problem& p, const Quantisation& q) {
  const char* format = kQuantiseds.name(q.format);
  const bool is_block = is_block_format(q.format);
  if (q.scales != Scales::kNone && (is_block || q.format == Quantised::kNone)) {
    return invalid(fmt::format("scales_{} is {}; it must be none where quantised_{} is {}",
                               q.letter, kScales.name(q.scales), q.letter, format));
  }
  WH_RETURN_IF_ERROR(check_strides(fmt::format("stride_scales_{}", q.letter).c_str(),
                                   scales_extents(p, q.scales, q.extents[3]), q.stride_scales));
  if (!is_block) return {};
  if (q.extents[3] % kBlockElements != 0) {
    return invalid(fmt::format("dim_{} is {}; as quantised_{} is {} it must be a multiple of {}",
                               q.letter[0] == 'k' ? "qk" : "v", q.extents[3], q.letter, format,
                               kBlockElements));
  }
  for (size_t i = 0; i < 4; ++i) {
    if (!is_stepped_over(q.extents[i])) continue;
    if (i == 3 ? q.stride[i] == 1 : q.stride[i] % kBlockElements == 0) continue;
    return invalid(fmt::format("stride_{}[{}] is {}; as quantised_{} is {} it must be {}", q.letter,
                               i, q.stride[i], q.letter, format,
                               i == 3 ? "1" : fmt::format("a multiple of {}", kBlockElements)));
  }
  return {};
}

Status validate_quantised(const Problem& p) {
  WH_RETURN_IF_ERROR(validate_quantised(p, quantisation_k(p)));
  WH_RETURN_IF_ERROR(validate_quantised(p, quantisation_v(p)));
  if (p.values_in_keys && (p.quantised_v != p.quantised_k || p.scales_v != p.scales_k)) {
    const auto text = [](Quantised format, Scales scales) {
      return fmt::format("{} with scales {}", kQuantiseds.name(format), kScales.name(scales));
    };
    return invalid(fmt::format("quantised_v is {}; as v lies in k it must be {}",
                               text(p.quantised_v, p.scales_v), text(p.quantised_k, p.scales_k)));
  }
  if (p.pass == Pass::kBackward && is_quantised(p)) {
    return invalid(
        fmt::format("quantised_k is {} and quantised_v {}; both must be none in the "
                    "backward pass, as codes have no gradients",
                    kQuantiseds.name(p.quantised_k), kQuantiseds.name(p.quantised_v)));
  }
  return {};
}

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

// A layout's fields are set where it is chosen, and 0 where it is not.
Status check_used(const char* name, int64_t value, bool is_used, const char* layout) {
  if (is_used == (value > 0)) return {};
  if (is_used) return invalid(fmt::format("{} is 0; {} need at least 1", name, layout));
  return invalid(fmt::format("{} is {}; it must be 0 but for {}", name, value, layout));
}

Status validate_layouts(const Problem& p) {
  const bool is_packed_q = p.query_layout == QueryLayout::kPacked;
  const bool is_paged = p.key_layout == KeyLayout::kPaged;
  if (!is_packed_q) WH_RETURN_IF_ERROR(check_used("total_q", p.total_q, false, "packed queries"));
  if (p.key_layout != KeyLayout::kPacked) {
    WH_RETURN_IF_ERROR(check_used("total_k", p.total_k, false, "packed keys"));
  }
  WH_RETURN_IF_ERROR(check_used("page_size", p.page_size, is_paged, "paged keys"));
  if (!is_paged) {
    WH_RETURN_IF_ERROR(check_used("pages", p.pages, false, "paged keys"));
    WH_RETURN_IF_ERROR(check_used("stride_page_table", p.stride_page_table, false, "paged keys"));
    if (p.has_page_offsets) {
      return invalid("uses says page_offsets, which cut the page table of paged keys alone");
    }
  } else if (!p.has_key_lengths) {
    return invalid("uses has no key_lengths; paged keys need them, from 0 to len_k each");
  }
  if (!p.has_page_offsets) {
    WH_RETURN_IF_ERROR(
        check_used("page_entries", p.page_entries, false, "page tables that page_offsets cut"));
  }
  const __int128 table = static_cast<__int128>(p.batch) * p.stride_page_table;
  if (table > std::numeric_limits<int64_t>::max() / 16) {
    return invalid("batch * stride_page_table overflows a 64-bit byte offset");
  }
  if (is_packed_q && p.mask != MaskKind::kNone) {
    return invalid(
        fmt::format("mask is {}; it must be none where queries are packed", kMasks.name(p.mask)));
  }
  if (p.pass == Pass::kBackward && p.key_layout == KeyLayout::kPaged) {
    return invalid(
        "pass is backward with paged keys; they must be dense or packed, as caches are not "
        "trained");
  }
  return {};
}

}  // namespace

Storage query_storage(const Problem& p) {
  if (p.query_layout == QueryLayout::kPacked) return {1, p.total_q};
  return {p.batch, p.len_q};
}

Storage key_storage(const Problem& p) {
  switch (p.key_layout) {
    case KeyLayout::kDense:
      break;
    case KeyLayout::kPacked:
      return {1, p.total_k};
    case KeyLayout::kPaged:
      return {p.pages, p.page_size};
  }
  return {p.batch, p.len_k};
}

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

Strides token_strides(int64_t heads, int64_t length, int64_t dim) {
  const int64_t token = saturating_product(heads, dim);
  return {saturating_product(length, token), dim, token, 1};
}

Extents scales_extents(const Problem& p, Scales scales, int64_t columns) {
  switch (scales) {
    case Scales::kNone:
      return {0, 0, 0, 0};
    case Scales::kTensor:
      return {1, 1, 1, 1};
    case Scales::kHead:
      return {p.batch, p.heads_kv, 1, 1};
    case Scales::kTokenHead:
      return {key_storage(p).batch, p.heads_kv, key_storage(p).length, 1};
    case Scales::kChannel:
      return {p.batch, p.heads_kv, 1, columns};
  }
  __builtin_unreachable();
}

Strides dense_scales_strides(const Problem& p, Scales scales, int64_t columns) {
  const Extents extents = scales_extents(p, scales, columns);
  return dense_strides(extents[1], extents[2], extents[3]);
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
  if (p.has_page_offsets || p.batch <= 1) p.stride_page_table = 0;
  const auto of_scales = [&](Scales scales, int64_t columns, const Strides& strides) {
    if (scales == Scales::kNone) return Strides{};
    return stepped_strides(scales_extents(p, scales, columns), strides);
  };
  p.stride_scales_k = of_scales(p.scales_k, p.dim_qk, p.stride_scales_k);
  p.stride_scales_v =
      p.values_in_keys ? p.stride_scales_k : of_scales(p.scales_v, p.dim_v, p.stride_scales_v);
  const bool has_elements = p.quantised_k == Quantised::kNone || p.quantised_v == Quantised::kNone;
  if (!has_elements) p.dtype_kv = p.dtype_q;  // nothing is of it
  return p;
}

void set_dense(Problem& p) {
  const auto of_queries = p.query_layout == QueryLayout::kDense ? dense_strides : token_strides;
  const auto of_keys = p.key_layout == KeyLayout::kDense ? dense_strides : token_strides;
  const int64_t queries = query_storage(p).length, keys = key_storage(p).length;
  p.stride_q = of_queries(p.heads_q, queries, p.dim_qk);
  p.stride_k = of_keys(p.heads_kv, keys, p.dim_qk);
  p.stride_v = p.values_in_keys ? p.stride_k : of_keys(p.heads_kv, keys, p.dim_v);
  p.stride_out = of_queries(p.heads_q, queries, p.dim_v);
  const bool has_rows = p.key_layout == KeyLayout::kPaged && !p.has_page_offsets;
  p.stride_page_table = has_rows ? p.pages_a_sequence() : 0;
  p.stride_scales_k = dense_scales_strides(p, p.scales_k, p.dim_qk);
  p.stride_scales_v =
      p.values_in_keys ? p.stride_scales_k : dense_scales_strides(p, p.scales_v, p.dim_v);
  p.scale = 1 / std::sqrt(static_cast<float>(p.dim_qk));
}

TensorBytes tensor_bytes(const Problem& p) {
  const auto bytes_q = static_cast<int64_t>(dtype_bytes(p.dtype_q));
  const auto stored = [&](const Quantisation& q) {
    return stored_bytes(q.format, p.dtype_kv, span_elements(q.extents, q.stride));
  };
  const auto scales = [&](const Quantisation& q) {
    return 4 * span_elements(scales_extents(p, q.scales, q.extents[3]), q.stride_scales);
  };
  TensorBytes bytes;
  bytes.q = span_elements(extents_q(p), p.stride_q) * bytes_q;
  bytes.k = stored(quantisation_k(p));
  bytes.scales_k = scales(quantisation_k(p));
  if (!p.values_in_keys) {
    bytes.v = stored(quantisation_v(p));
    bytes.scales_v = scales(quantisation_v(p));
  }
  const auto bytes_out = static_cast<int64_t>(dtype_bytes(p.dtype_out()));
  bytes.out = span_elements(extents_out(p), p.stride_out) * bytes_out;
  if (p.mask != MaskKind::kNone) {
    bytes.mask = span_elements(extents_mask(p), p.stride_mask) * mask_element_bytes(p);
  }
  if (p.has_sinks) bytes.sinks = p.heads_q * 4;
  if (p.has_key_lengths) bytes.key_lengths = p.batch * 4;
  if (p.has_key_starts) bytes.key_starts = p.batch * 4;
  if (p.query_layout == QueryLayout::kPacked) bytes.query_offsets = (p.batch + 1) * 4;
  if (p.key_layout == KeyLayout::kPacked) bytes.key_offsets = (p.batch + 1) * 4;
  if (p.has_page_offsets) {
    bytes.page_table = p.page_entries * 4;
    bytes.page_offsets = (p.batch + 1) * 4;
  } else if (p.key_layout == KeyLayout::kPaged && p.batch > 0 && p.pages_a_sequence() > 0) {
    bytes.page_table = ((p.batch - 1) * p.stride_page_table + p.pages_a_sequence()) * 4;
  }
  const bool is_backward = p.pass == Pass::kBackward;
  if (p.wants_log_sum_exp || is_backward) {
    bytes.log_sum_exp = query_storage(p).batch * p.heads_q * query_storage(p).length * 4;
  }
  if (!is_backward) return bytes;
  bytes.d_out = span_elements(extents_out(p), p.stride_d_out) * bytes_q;
  const auto bytes_kv = static_cast<int64_t>(dtype_bytes(p.dtype_kv));
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
  WH_RETURN_IF_ERROR(validate_layouts(p));
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
  WH_RETURN_IF_ERROR(validate_quantised(p));
  WH_RETURN_IF_ERROR(check_strides("stride_out", extents_out(p), p.stride_out));
  WH_RETURN_IF_ERROR(check_distinct("out", extents_out(p), p.stride_out));
  if (p.pass == Pass::kBackward) {
    if (p.f32_out) return invalid("f32_out is true; it must be false in the backward pass");
    WH_RETURN_IF_ERROR(validate_gradients(p));
  }
  if (p.mask != MaskKind::kNone) {
    WH_RETURN_IF_ERROR(check_strides("stride_mask", extents_mask(p), p.stride_mask));
  }
  const __int128 rows = static_cast<__int128>(std::max<int64_t>(p.batch, 1)) * p.heads_q *
                        std::max(p.len_q, p.total_q);
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
  const MemorySpan out{"out", t.out, bytes.out, element_out};
  const MemorySpan lse{"log_sum_exp", t.log_sum_exp, bytes.log_sum_exp, 4};
  const MemorySpan none{"", nullptr, 0, 0};
  // What a run writes shares memory with nothing else.
  const MemorySpan outputs[] = {
      is_backward ? none : out,           is_backward ? none : lse,
      {"dq", t.dq, bytes.dq, element_q},  {"dk", t.dk, bytes.dk, element_kv},
      {"dv", t.dv, bytes.dv, element_kv}, {"d_sinks", t.d_sinks, bytes.d_sinks, 4}};
  const MemorySpan inputs[] = {{"q", t.q, bytes.q, element_q},
                               {"k", t.k, bytes.k, stored_alignment(p.quantised_k, p.dtype_kv)},
                               {"v", t.v, bytes.v, stored_alignment(p.quantised_v, p.dtype_kv)},
                               {"scales_k", t.scales_k, bytes.scales_k, 4},
                               {"scales_v", t.scales_v, bytes.scales_v, 4},
                               {"mask", t.mask, bytes.mask, mask_element_bytes(p)},
                               {"sinks", t.sinks, bytes.sinks, 4},
                               {"key_lengths", t.key_lengths, bytes.key_lengths, 4},
                               {"key_starts", t.key_starts, bytes.key_starts, 4},
                               {"query_offsets", t.query_offsets, bytes.query_offsets, 4},
                               {"key_offsets", t.key_offsets, bytes.key_offsets, 4},
                               {"page_table", t.page_table, bytes.page_table, 4},
                               {"page_offsets", t.page_offsets, bytes.page_offsets, 4},
                               is_backward ? out : none,
                               is_backward ? lse : none,
                               {"d_out", t.d_out, bytes.d_out, element_q}};
  if (!writes_anything(p)) return {};  // nothing is read either
  for (const MemorySpan& output : outputs) {
    if (output.bytes == 0) continue;
    if (output.data == nullptr) {
      return invalid(
          fmt::format("{} is null; it must point to where the result goes", output.name));
    }
    WH_RETURN_IF_ERROR(check_alignment(output));
  }
  for (const MemorySpan& input : inputs) {
    if (input.bytes == 0) continue;
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
  const MemorySpan workspace{"workspace", t.workspace, static_cast<int64_t>(t.workspace_bytes), 0};
  for (const MemorySpan& input : inputs) WH_RETURN_IF_ERROR(check_apart(workspace, input));
  for (size_t i = 0; i < std::size(outputs); ++i) {
    for (const MemorySpan& input : inputs) WH_RETURN_IF_ERROR(check_apart(outputs[i], input));
    for (size_t j = 0; j < i; ++j) WH_RETURN_IF_ERROR(check_apart(outputs[j], outputs[i]));
    WH_RETURN_IF_ERROR(check_apart(outputs[i], workspace));
  }
  return {};
}

namespace {

// Of the parts into which a tensor of `total` tokens or pages is cut.
struct Cut {
  const char* name;  // of the offsets
  const int32_t* offsets;
  int64_t most;  // of one part
  const char* most_name;
  int64_t total;
  const char* total_name;
};

Status validate_cut(const Cut& cut, int64_t batch) {
  if (cut.offsets == nullptr) return {};
  if (cut.offsets[0] != 0) {
    return invalid(fmt::format("{}[0] is {}; it must be 0", cut.name, cut.offsets[0]));
  }
  for (int64_t b = 1; b <= batch; ++b) {
    const int64_t end = cut.offsets[b], begin = cut.offsets[b - 1];
    if (end < begin || end > cut.total) {
      return invalid(fmt::format("{}[{}] is {}; it must be between {}[{}], {}, and {}, {}",
                                 cut.name, b, end, cut.name, b - 1, begin, cut.total_name,
                                 cut.total));
    }
    if (end - begin > cut.most) {
      return invalid(fmt::format("{}[{}] is {}, {} after the one before; {}, the most, is {}",
                                 cut.name, b, end, end - begin, cut.most_name, cut.most));
    }
  }
  return {};
}

// The entries of the table that a length makes visible.
Status validate_pages(const Problem& p, const Tensors& t, int64_t b) {
  const int64_t length = t.key_lengths[b];
  const int64_t begin = p.has_key_starts ? std::min<int64_t>(t.key_starts[b], length) : 0;
  if (p.has_page_offsets) {
    const int64_t listed = (t.page_offsets[b + 1] - t.page_offsets[b]) * p.page_size;
    if (length > listed) {
      return invalid(fmt::format(
          "key_lengths[{}] is {}; it must be at most {}, what the pages between page_offsets[{}] "
          "and page_offsets[{}] hold",
          b, length, listed, b, b + 1));
    }
  }
  const int64_t first = p.has_page_offsets ? t.page_offsets[b] : b * p.stride_page_table;
  for (int64_t i = begin / p.page_size; i * p.page_size < length; ++i) {
    const int32_t page = t.page_table[first + i];
    if (page >= 0 && page < p.pages) continue;
    return invalid(
        fmt::format("page_table[{}] is {}, page {} of sequence {}; it must be between 0 and {}",
                    first + i, page, i, b, p.pages - 1));
  }
  return {};
}

}  // namespace

Status validate_sequences(const Problem& p, const Tensors& t) {
  if (!writes_anything(p)) return {};  // and nothing is read: they may be null
  const bool is_packed_q = p.query_layout == QueryLayout::kPacked;
  const bool is_packed_k = p.key_layout == KeyLayout::kPacked;
  const Cut cuts[] = {{"query_offsets", is_packed_q ? t.query_offsets : nullptr, p.len_q, "len_q",
                       p.total_q, "total_q"},
                      {"key_offsets", is_packed_k ? t.key_offsets : nullptr, p.len_k, "len_k",
                       p.total_k, "total_k"},
                      {"page_offsets", p.has_page_offsets ? t.page_offsets : nullptr, kMaxLength,
                       "2^31 - 1", p.page_entries, "page_entries"}};
  for (const Cut& cut : cuts) WH_RETURN_IF_ERROR(validate_cut(cut, p.batch));
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t len_k = is_packed_k ? t.key_offsets[b + 1] - t.key_offsets[b] : p.len_k;
    if (p.has_key_lengths && (t.key_lengths[b] < 0 || t.key_lengths[b] > len_k)) {
      return invalid(fmt::format("key_lengths[{}] is {}; it must be between 0 and {}, {}", b,
                                 t.key_lengths[b], is_packed_k ? "its packed keys" : "len_k",
                                 len_k));
    }
    if (p.has_key_starts && t.key_starts[b] < 0) {
      return invalid(
          fmt::format("key_starts[{}] is {}; it must not be negative", b, t.key_starts[b]));
    }
    if (p.key_layout == KeyLayout::kPaged) WH_RETURN_IF_ERROR(validate_pages(p, t, b));
  }
  return {};
}

Result<Problem> problem_of_run(const Problem& planned, const Tensors& t) {
  Problem p = planned;
  if (t.batch != 0) {
    WH_RETURN_IF_ERROR(check_range("tensors.batch", t.batch, 0, planned.batch));
    p.batch = t.batch;
  }
  if (t.total_q != 0) {
    WH_RETURN_IF_ERROR(check_range("tensors.total_q", t.total_q, 0, planned.total_q));
    p.total_q = t.total_q;
  }
  return p;
}

bool writes_anything(const Problem& p) {
  const TensorBytes bytes = tensor_bytes(p);
  // Packed tokens of no sequence stay as they are.
  if (p.batch == 0) return bytes.d_sinks > 0;
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
  const auto stored = [&](Quantised format, Scales scales) {
    if (format == Quantised::kNone) return std::string(kDtypes.name(p.dtype_kv));
    std::string name = kQuantiseds.name(format);
    if (scales != Scales::kNone) name += fmt::format(":{}", kScales.name(scales));
    return name;
  };
  const std::string k = stored(p.quantised_k, p.scales_k), v = stored(p.quantised_v, p.scales_v);
  if (k != v) {
    text += fmt::format(" over {} keys and {} values", k, v);
  } else if (k != kDtypes.name(p.dtype_q)) {
    text += " over " + k;
  }
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
  if (p.query_layout == QueryLayout::kPacked) text += fmt::format(", {} packed queries", p.total_q);
  if (p.key_layout == KeyLayout::kPacked) text += fmt::format(", {} packed keys", p.total_k);
  if (p.key_layout == KeyLayout::kPaged) {
    text += fmt::format(", {} pages of {}", p.pages, p.page_size);
  }
  return text;
}

}  // namespace wh
