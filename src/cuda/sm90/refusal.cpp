#include "cuda/sm90/refusal.h"

#include <fmt/format.h>

#include <numeric>
#include <utility>

#include "core/names.h"
#include "cuda/common/tensor_map.h"
#include "cuda/common/variants.h"
#include "cuda/cuda_facts.h"
#include "cuda/sm90/common/panels.h"

namespace wh::cuda {
namespace {
constexpr int64_t kLeastBoxKeys = 8;

// Of keys and values that are codes, which are widened in shared memory.
std::optional<std::string> code_refusal(const Problem& p) {
  for (const Quantised format : {p.quantised_k, p.quantised_v}) {
    if (format != Quantised::kE4m3 && format != Quantised::kInt8) {
      return fmt::format(
          "widens e4m3 and int8, of keys and of values; some are {}",
          format == Quantised::kNone ? kDtypes.name(p.dtype_kv) : kQuantiseds.name(format));
    }
  }
  if (p.values_in_keys) return "widens values of their own, not those within keys";
  if (p.scales_k == Scales::kChannel) {
    return "takes scales of keys per tensor, head or token; those of channels would round q again";
  }
  if (p.scales_v == Scales::kTokenHead && p.dtype_q == Dtype::kF16) {
    return "multiplies weights by the scales of tokens, which f16 does not hold; bf16 queries do";
  }
  for (const auto& [name, stride] : {std::pair{"k", p.stride_k}, {"v", p.stride_v}}) {
    for (size_t i = 0; i < 3; ++i) {
      if (stride[i] % 16 != 0) {
        return fmt::format("{} has a stride of {} codes; TMA needs a multiple of 16", name,
                           stride[i]);
      }
    }
  }
  return std::nullopt;
}

}  // namespace

std::optional<std::string> store_refusal(const char* name, const Strides& strides) {
  if (strides[3] != 1) {
    return fmt::format("{} has a dim stride of {}; vector stores need 1", name, strides[3]);
  }
  for (int i = 0; i < 3; ++i) {
    if (strides[i] % 4 != 0) {
      return fmt::format("{} has a stride of {} elements; vector stores need a multiple of 4", name,
                         strides[i]);
    }
  }
  return std::nullopt;
}

std::optional<std::string> sm90_refusal(const Query& query) {
  const Problem& p = query.problem;
  if (cuda_facts(query).compute_capability != 90) {
    return fmt::format("needs compute capability 9.0 (Hopper); this card has {}.{}",
                       cuda_facts(query).compute_capability / 10,
                       cuda_facts(query).compute_capability % 10);
  }
  const bool is_16_bit = p.dtype_q == Dtype::kF16 || p.dtype_q == Dtype::kBf16;
  const bool is_one_type = p.dtype_q == p.dtype_kv || is_quantised(p);
  if (!is_one_type || !is_16_bit) {
    return "needs q, k and v in one 16-bit type, f16 or bf16";
  }
  if (query.limits.precision == Precision::kHigh) {
    return "rounds the weights to the input type; precision high forbids that";
  }
  if (auto reason = extent_refusal(p)) return reason;
  if (auto reason = tensor_map_refusal("q", p.stride_q, p.dim_qk)) return reason;
  if (auto reason = tensor_map_refusal("k", p.stride_k, p.dim_qk)) return reason;
  if (auto reason = tensor_map_refusal("v", p.stride_v, p.dim_v)) return reason;
  if (p.key_layout == KeyLayout::kPaged && p.page_size % kLeastBoxKeys != 0) {
    return fmt::format("takes pages of a multiple of {} keys, these are of {}", kLeastBoxKeys,
                       p.page_size);
  }
  if (auto reason = store_refusal("out", p.stride_out)) return reason;
  return is_quantised(p) ? code_refusal(p) : std::nullopt;
}

Status check_alignment(const char* name, const void* pointer, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes == 0) return {};
  return invalid(fmt::format("{} is at {}; this kernel needs it aligned to {} bytes", name,
                             fmt::ptr(pointer), bytes));
}

Layouts layouts_of(const Problem& p) { return p.is_dense() ? Layouts::kDense : Layouts::kAll; }

int row_boxes(const Problem& p, int columns) {
  return panels_of(is_quantised(p) ? (columns + 1) / 2 : columns);
}

double boxes_us(const Problem& p, double boxes) {
  constexpr double kBoxUs = 0.065;
  return p.key_layout == KeyLayout::kPaged ? boxes * kBoxUs : 0;
}

int32_t box_keys(const Problem& p, int32_t rows) {
  if (p.key_layout != KeyLayout::kPaged) return rows;
  const int64_t both = std::gcd<int64_t>(p.page_size, rows);
  return static_cast<int32_t>(both & -both);
}

Status check_alignment(const Problem& p, const Tensors& t) {
  WH_RETURN_IF_ERROR(check_alignment("q", t.q, 16));
  if (p.len_k > 0) {
    WH_RETURN_IF_ERROR(check_alignment("k", t.k, 16));
    WH_RETURN_IF_ERROR(check_alignment("v", t.v, 16));
  }
  return check_alignment("out", t.out, 8);
}

}  // namespace wh::cuda
