// The names of limits', kernels' and plans' enum values, next to those of the problem's.
#pragma once

#include "core/names.h"
#include "plan/plan.h"

namespace wh {

constexpr Names<Policy, 3> kPolicies{{"automatic", "fused", "fused-above"}};
constexpr Names<Precision, 2> kPrecisions{{"native", "high"}};
constexpr Names<Role, 3> kRoles{{"fused", "baseline", "reference"}};
constexpr Names<Arithmetic, 6> kArithmetics{{"f64", "f32", "3xTF32", "f16", "bf16", "bf16-high"}};
constexpr Names<Verdict, 4> kVerdicts{{"chosen", "slower", "refused", "over_budget"}};

}  // namespace wh
