// Which instance of a CUDA kernel runs a problem, in a build with all of them and in one with a
// part (WIDEHEAD_CUDA_INSTANCES=ci), checked without a GPU.
#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <span>
#include <string>
#include <tuple>

#include "cuda/cuda_facts.h"
#include "cuda/instances.h"
#include "cuda/portable/backward/config.h"
#include "cuda/portable/config.h"
#include "cuda/portable/tiles.h"
#include "cuda/sm90/backward/config.h"
#include "cuda/sm90/backward_wide/config.h"
#include "cuda/sm90/decode/config.h"
#include "cuda/sm90/decode/tiles.h"
#include "cuda/sm90/prefill/config.h"
#include "cuda/sm90/prefill/tiles.h"
#include "cuda/sm90/prefill_wide/config.h"
#include "cuda/sm90/prefill_wide/tiles.h"
#include "support/cards.h"
#include "support/problems.h"

namespace wh::cuda {
namespace {

CudaFacts hopper(bool only_compiled) {
  CudaFacts facts = h100();
  facts.only_compiled = only_compiled;
  return facts;
}

Problem problem(int64_t dim_qk, int64_t dim_v, Dtype dtype) {
  return backward_of(square_of_300(dim_qk, dim_v, dtype, Device::kCuda));
}

struct Listed {
  const Kernel& kernel;
  std::span<const Instance> instances;  // Config::instance counts them
};
const Listed kListed[] = {{kSm90Prefill, kPrefillInstances},
                          {kSm90PrefillWide, kWideInstances},
                          {kSm90Decode, kDecodeInstances},
                          {kSm90Backward, kGradientInstances},
                          {kSm90BackwardWide, kWideGradientInstances}};

// The one with the least padding, by a look at all of them.
const Instance* narrowest(const Listed& listed, const Problem& p, bool only_compiled) {
  const Instance* best = nullptr;
  for (const Instance& one : listed.instances) {
    if (one.dtype != p.dtype_q || (only_compiled && !one.is_compiled)) continue;
    if (one.dims.dim_qk < p.dim_qk || one.dims.dim_v < p.dim_v) continue;
    if (best == nullptr ||
        one.dims.dim_qk + one.dims.dim_v < best->dims.dim_qk + best->dims.dim_v) {
      best = &one;
    }
  }
  return best;
}

TEST(CudaInstances, TheNarrowestThatIsThereIsTaken) {
  const Limits limits;
  for (const bool only_compiled : {false, true}) {
    const CudaFacts cuda = hopper(only_compiled);
    for (const Listed& listed : kListed) {
      for (const Dtype dtype : {Dtype::kF16, Dtype::kBf16}) {
        for (int64_t dim_qk = 8; dim_qk <= 640; dim_qk += 8) {
          for (const int64_t dim_v : {int64_t{8}, int64_t{128}, dim_qk}) {
            const Problem p = problem(dim_qk, dim_v, dtype);
            const Query query{p, limits, cuda};
            const Instance* expected = narrowest(listed, p, only_compiled);
            const auto reason = listed.kernel.refusal(query);
            ASSERT_EQ(reason.has_value(), expected == nullptr)
                << listed.kernel.name << " " << dim_qk << "/" << dim_v << ": "
                << reason.value_or("taken");
            if (expected == nullptr) {
              // Whose fault it is.
              EXPECT_EQ(reason->find("WIDEHEAD_CUDA_INSTANCES=ci") != std::string::npos,
                        narrowest(listed, p, false) != nullptr)
                  << *reason;
              continue;
            }
            const int32_t instance = listed.kernel.configure(query).instance;
            ASSERT_EQ(&listed.instances[static_cast<size_t>(instance)], expected)
                << listed.kernel.name << " " << dim_qk << "/" << dim_v;
          }
        }
      }
    }
  }
}

void expect_functions(const TileVariant& variant, const Instance& instance, bool takes_masks) {
  for (const Layouts layouts : {Layouts::kDense, Layouts::kAll}) {
    for (const Scores scores : {Scores::kPlain, Scores::kTransformed, Scores::kMasked}) {
      const auto function =
          variant.functions[static_cast<size_t>(layouts)][static_cast<size_t>(scores)];
      const bool is_taken =
          scores != Scores::kMasked || (takes_masks && layouts == Layouts::kDense);
      EXPECT_EQ(function != nullptr, is_taken && instance.is_compiled);
    }
  }
}

TEST(CudaInstances, WhatIsCompiledHasItsFunctionAndNothingElseHas) {
  Config config;
  const auto next_tile_variant = [&](const auto& variant_of, const Instance& instance,
                                     bool reads_codes, bool takes_masks = true) {
    const TileVariant& variant = variant_of(config);
    EXPECT_EQ(variant.reads_codes, reads_codes);
    expect_functions(variant, instance, takes_masks);
    ++config.instance;
  };
  for (const Instance& instance : kPrefillInstances) {
    next_tile_variant(prefill_variant, instance, false);
  }
  for (const Instance& instance : kPrefillCodeInstances) {
    next_tile_variant(prefill_variant, instance, true);
  }
  config = {};
  for (const Instance& instance : kWideInstances) next_tile_variant(wide_variant, instance, false);
  for (const Instance& instance : kWideCodeInstances) {
    next_tile_variant(wide_variant, instance, true, false);
  }
  config = {};
  const auto next_decode_variant = [&](const Instance& instance, bool reads_codes) {
    const DecodeVariant& variant = decode_variant(config);
    EXPECT_EQ(variant.reads_codes, reads_codes);
    for (const auto function : variant.functions) {
      EXPECT_EQ(function != nullptr, instance.is_compiled);
    }
    ++config.instance;
  };
  for (const Instance& instance : kDecodeInstances) next_decode_variant(instance, false);
  for (const Instance& instance : kDecodeCodeInstances) next_decode_variant(instance, true);
}

// What takes over where something is not finite is in the same builds.
void expect_takeover(const Instance& instance) {
  if (!instance.is_compiled) return;
  const Problem p = problem(instance.dims.dim_qk, instance.dims.dim_v, instance.dtype);
  EXPECT_NE(portable_backward_variant(p, hopper(true)), nullptr);
}

TEST(CudaInstances, TheBackwardPassHasBothItsKernelsOrNone) {
  Config config;
  for (const Instance& instance : kGradientInstances) {
    for (const auto& functions :
         {gradient_variant(config).queries, gradient_variant(config).keys}) {
      for (const auto function : functions) EXPECT_EQ(function != nullptr, instance.is_compiled);
    }
    expect_takeover(instance);
    ++config.instance;
  }
  config = {};
  for (const Instance& instance : kWideGradientInstances) {
    const WideGradientVariant& variant = wide_gradient_variant(config);
    for (const auto& functions : {variant.dq, variant.dk, variant.dv}) {
      for (const auto function : functions) EXPECT_EQ(function != nullptr, instance.is_compiled);
    }
    expect_takeover(instance);
    ++config.instance;
  }
  config = {};
  for (const Instance& instance : kBackwardInstances) {
    Problem p = problem(instance.dims.dim_qk, instance.dims.dim_v, instance.dtype);
    const PortableBackwardVariant* variant =
        portable_backward_variant(p, config, static_cast<int64_t>(instance.memory));
    ASSERT_NE(variant, nullptr);
    EXPECT_EQ(variant->queries != nullptr, instance.is_compiled);
    EXPECT_EQ(variant->keys != nullptr, instance.is_compiled);
    ++config.instance;
  }
}

// What a kernel's code differs in, beyond counts of rows and keys.
using Family = std::tuple<int, int, int, int>;

template <typename FamilyOf>
void expect_every_family(std::span<const Instance> instances, FamilyOf family_of) {
  std::set<Family> listed, compiled;
  std::set<Dtype> listed_types, compiled_types;
  for (const Instance& instance : instances) {
    listed.insert(family_of(instance));
    listed_types.insert(instance.dtype);
    if (!instance.is_compiled) continue;
    compiled.insert(family_of(instance));
    compiled_types.insert(instance.dtype);
  }
  EXPECT_EQ(compiled, listed);
  EXPECT_EQ(compiled_types, listed_types);
}

TEST(CudaInstances, EveryBuildHasEveryTypeAndTileFamilyOfEveryKernel) {
  expect_every_family(kPrefillInstances, [](const Instance& instance) {
    const PrefillTile tile = prefill_tile(instance.dims, Scores::kPlain, Layouts::kDense);
    return Family{tile.warpgroups, tile.tile_k, tile.stages, 0};
  });
  expect_every_family(kWideInstances, [](const Instance& instance) {
    const WideTile tile = wide_tile(instance.dims, Scores::kPlain, Layouts::kDense);
    return Family{tile.tile_k, tile.left_slots, tile.right_slots, 0};
  });
  expect_every_family(kDecodeInstances, [](const Instance& instance) {
    Config config;
    config.instance = static_cast<int32_t>(&instance - kDecodeInstances);
    const DecodeVariant& variant = decode_variant(config);
    return Family{variant.tile_k, variant.threads, 0, 0};
  });
  expect_every_family(kPortableInstances, [](const Instance& instance) {
    const auto bytes = static_cast<int>(dtype_bytes(instance.dtype));
    const PortableTile tile = portable_tile(instance.dims, bytes, instance.memory);
    return Family{bytes, tile.warp_rows, tile.column_groups, tile.shares_buffer};
  });
  expect_every_family(kBackwardInstances, [](const Instance& instance) {
    const auto bytes = static_cast<int>(dtype_bytes(instance.dtype));
    const auto groups = [&](Side side) {
      return backward_tile(instance.dims, bytes, side, instance.memory).column_groups;
    };
    return Family{bytes, groups(Side::kQueries), groups(Side::kKeys), 0};
  });
  expect_every_family(kWideGradientInstances, [](const Instance&) { return Family{0, 0, 0, 0}; });
  expect_every_family(kGradientInstances, [](const Instance& instance) {
    return Family{gradient_tile(instance.dims, Side::kKeys).has_roles, 0, 0, 0};
  });
  const auto by_rows = [](const Instance& instance) {
    return Family{instance.dims.dim_v, instance.rows, 0, 0};
  };
  expect_every_family(kFewRowsInstances, by_rows);
  expect_every_family(kCodeRowsInstances, by_rows);
}

// The last resort of every card: no build may refuse what all of them takes.
TEST(CudaInstances, CudaPortableTakesEverythingInEveryBuild) {
  const Limits limits;
  for (const int64_t shared_bytes : {101376, 166912, 232448}) {
    CudaFacts cuda = hopper(true);
    cuda.shared_bytes = shared_bytes;
    for (const Dtype dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBf16}) {
      for (int64_t dim = 1; dim <= 1024; dim += 31) {
        const Problem p = problem(dim, dim, dtype);
        const Query query{p, limits, cuda};
        ASSERT_EQ(kPortable.refusal(query), std::nullopt);
        const PortableVariant* variant =
            portable_variant(p, kPortable.configure(query), shared_bytes);
        ASSERT_NE(variant, nullptr);
        EXPECT_NE(variant->function, nullptr);
      }
    }
  }
}

}  // namespace
}  // namespace wh::cuda
