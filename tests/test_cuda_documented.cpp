// What the CUDA kernels refuse against what is documented, on the whole case table and for several
// cards, without a GPU.
#include <gtest/gtest.h>

#include <map>
#include <optional>
#include <string>

#include "cases.h"
#include "cuda/cuda_facts.h"
#include "cuda/registry.h"
#include "cuda/unfused/cublas_lt.h"
#include "documented.h"
#include "plan/kernel.h"
#include "support/cards.h"
#include "support/problems.h"

namespace wh {
namespace {

class CudaDocumented : public testing::TestWithParam<CaseSet> {};

TEST_P(CudaDocumented, KernelsTakeWhatThePagesSayAndNothingElse) {
  const bool has_cublas_lt = cuda::cublas_lt_unavailable().empty();
  for (const CudaFacts& facts : {h100(), ampere(), ada()}) {
    std::map<std::string, int64_t> taken;
    for (const Case& c : make_cases(GetParam(), Device::kCuda, 7)) {
      for (const Kernel* kernel : cuda::kernels()) {
        if (kernel->name == std::string("cuda_unfused") && !has_cublas_lt) continue;
        const Problem p = kernel->pass == Pass::kForward ? c.problem : backward_of(c.problem);
        if (!validate(p).ok())
          continue;  // no kernel is asked: gradients of f32 outputs, overlapping ones
        // Codes and layouts are the planner's to refuse where a kernel does not say that it takes
        // them.
        const bool is_left_to_planner = (is_quantised(p) && !kernel->reads_quantised) ||
                                        (!p.is_dense() && !kernel->takes_all_layouts);
        const auto reason = is_left_to_planner
                                ? std::optional<std::string>("refused by the planner")
                                : kernel->refusal({canonical(p), c.limits, facts});
        const Documented documented{p, c.limits.precision, facts};
        ASSERT_EQ(!reason.has_value(), documented.takes(kernel->name))
            << kernel->name << " on " << c.name << ": " << reason.value_or("taken");
        if (!reason) ++taken[kernel->name];
      }
    }
    if (GetParam() == CaseSet::kLayouts) {
      EXPECT_GE(taken["cuda_portable"], 2000);
    }
    // As tools/gpu_check asks of a run on a Hopper card, where cuBLASLt is.
    if (GetParam() != CaseSet::kCi || facts.compute_capability != 90) continue;
    EXPECT_GE(taken["sm90_prefill"], 800);
    EXPECT_GE(taken["sm90_prefill_wide"], 1000);
    EXPECT_GE(taken["sm90_decode"], 1100);
    EXPECT_GE(taken["cuda_portable"], 2700);
    EXPECT_GE(taken["cuda_portable_backward"], 1500);
    EXPECT_GE(taken["sm90_backward"], 300);
    EXPECT_GE(taken["sm90_backward_wide"], 400);
  }
}

INSTANTIATE_TEST_SUITE_P(Sets, CudaDocumented,
                         testing::Values(CaseSet::kSmoke, CaseSet::kCi, CaseSet::kLayouts,
                                         CaseSet::kRagged, CaseSet::kCorner, CaseSet::kLarge));

}  // namespace
}  // namespace wh
