#include "cuda/sm90/backward_wide/kernel.h"

#include "cuda/sm90/backward/run.h"
#include "cuda/sm90/backward_wide/config.h"
#include "plan/kernel.h"

namespace wh::cuda {

Status run_sm90_backward_wide(const Launch& launch) {
  const WideGradientVariant& variant = wide_gradient_variant(launch.config);
  const auto scores = static_cast<size_t>(scores_of(launch.problem));
  const auto launch_one = [&](const GradientBlockArgs& args, const GradientRange& range,
                              Gradient of, const void* function) {
    return launch_gradients(launch, args, range,
                            {.tile = kWideGradientTile,
                             .function = function,
                             .shared_bytes = WideGradientMemory(variant.instance.dims, of).bytes,
                             .cluster = kWideGradientCluster});
  };
  return run_gradients(
      launch, wide_gradient_blocks(launch.problem),
      [&](const GradientBlockArgs& args, const GradientRange& range) -> Status {
        if (range.side == Side::kQueries) {
          return launch_one(args, range, Gradient::kDq, variant.dq[scores]());
        }
        WH_RETURN_IF_ERROR(launch_one(args, range, Gradient::kDk, variant.dk[scores]()));
        return launch_one(args, range, Gradient::kDv, variant.dv[scores]());
      });
}

}  // namespace wh::cuda
