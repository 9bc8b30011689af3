// Which of a kernel's instances runs a problem: one rule for all kernels. A variant is an instance
// with what its kernel knows about it, and its functions where this build has them. Those of
// kernels that take codes too say which they read, by a member `reads_codes`. Config::instance is a
// variant's place in the kernel's list.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <utility>

#include "core/names.h"
#include "core/problem.h"
#include "cuda/common/attention_args.h"
#include "cuda/common/instance.h"
#include "cuda/cuda_facts.h"

namespace wh::cuda {

constexpr bool is_narrowest_first(const Instance* instances, size_t count) {
  for (size_t i = 1; i < count; ++i) {
    const HeadDims a = instances[i - 1].dims, b = instances[i].dims;
    if (a.dim_qk + a.dim_v > b.dim_qk + b.dim_v) return false;
  }
  return true;
}

// make.operator()<kInstance>() for each of a table's instances, in its order.
template <const auto& kInstances, typename Make>
constexpr auto variants_of(Make make) {
  static_assert(is_narrowest_first(kInstances, std::size(kInstances)));
  return [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    return std::array{make.template operator()<kInstances[kIndex]>()...};
  }
  (std::make_index_sequence<std::size(kInstances)>());
}

// The variants of several tables as one list, in their order.
template <typename Variant, size_t... kCounts>
constexpr auto joined(const std::array<Variant, kCounts>&... tables) {
  std::array<Variant, (kCounts + ...)> all{};
  auto end = all.begin();
  ((end = std::ranges::copy(tables, end).out), ...);
  return all;
}

// make.operator()<kInstance, kReadsCodes>() for each instance over elements, then for each over
// codes.
template <const auto& kElementInstances, const auto& kCodeInstances, typename Make>
constexpr auto variants_of(Make make) {
  return joined(variants_of<kElementInstances>([&]<Instance kInstance>() {
                  return make.template operator()<kInstance, false>();
                }),
                variants_of<kCodeInstances>([&]<Instance kInstance>() {
                  return make.template operator()<kInstance, true>();
                }));
}

// Whether the table has the instance for cards with little shared memory too. Where the tile is the
// same for both classes of cards, so is the code.
template <const auto& kInstances>
constexpr bool has_small_twin(const Instance& instance) {
  return std::ranges::any_of(kInstances, [&](const Instance& other) {
    return other.dims == instance.dims && other.dtype == instance.dtype &&
           other.memory == SharedMemory::kSmall;
  });
}

template <typename Variant>
constexpr bool reads_codes(const Variant& variant) {
  if constexpr (requires { variant.reads_codes; }) {
    return variant.reads_codes;
  } else {
    return false;
  }
}

template <typename Variant>
bool holds(const Variant& variant, const Problem& p) {
  const Instance& instance = variant.instance;
  return p.dim_qk <= instance.dims.dim_qk && p.dim_v <= instance.dims.dim_v &&
         p.dtype_q == instance.dtype && reads_codes(variant) == is_quantised(p);
}

// The first that holds the problem and is accepted; -1: there is none.
template <typename Variant, size_t kCount, typename Accepts>
int32_t first_variant(const std::array<Variant, kCount>& variants, const Problem& p,
                      const CudaFacts& cuda, Accepts accepts) {
  for (size_t i = 0; i < kCount; ++i) {
    const Variant& variant = variants[i];
    if (holds(variant, p) && (variant.instance.is_compiled || !cuda.only_compiled) &&
        accepts(variant)) {
      return static_cast<int32_t>(i);
    }
  }
  return -1;
}
template <typename Variant, size_t kCount>
int32_t first_variant(const std::array<Variant, kCount>& variants, const Problem& p,
                      const CudaFacts& cuda) {
  return first_variant(variants, p, cuda, [](const Variant&) { return true; });
}

inline CudaFacts with_all_instances(CudaFacts cuda) {
  cuda.only_compiled = false;
  return cuda;
}

// The reason to refuse what an instance holds that this build lacks.
inline std::string not_compiled(const Problem& p) {
  return fmt::format("has no code for {} heads of {}/{} in this build (WIDEHEAD_CUDA_INSTANCES=ci)",
                     kDtypes.name(p.dtype_q), p.dim_qk, p.dim_v);
}

// Of kernels whose arguments are int32.
inline std::optional<std::string> extent_refusal(const Problem& p) {
  if (fits_int32(p)) return std::nullopt;
  return fmt::format("indexes heads and lengths by int32: at most {} each", kMaxExtent);
}

// What a kernel's variants take, and which heads are more.
using HeadLimits = fmt::format_string<const int64_t&, const int64_t&>;

// Why none of them runs the problem.
template <typename Variant, size_t kCount>
std::optional<std::string> variant_refusal(const std::array<Variant, kCount>& variants,
                                           const Problem& p, const CudaFacts& cuda,
                                           HeadLimits limits) {
  if (first_variant(variants, p, cuda) >= 0) return std::nullopt;
  if (first_variant(variants, p, with_all_instances(cuda)) >= 0) return not_compiled(p);
  return fmt::format(limits, p.dim_qk, p.dim_v);
}

}  // namespace wh::cuda
