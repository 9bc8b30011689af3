#include "cuda/device.h"
#include "parallel/nccl/devices.h"
#include "parallel/ranks.h"
#include "report/session.h"

namespace wh::cli {

int run_nccl_ranks(const Group& group, const RankMain& main) {
  if (group.device != Device::kCuda) {
    return report(invalid("--parallel nccl takes --device cuda: NCCL connects GPUs"));
  }
  const KeptStdout kept;  // NCCL logs there
  const auto devices = sharded::NcclDevices::make(group.ranks);
  if (!devices.ok()) return report(devices.status());
  return run_rank_threads((*devices)->ranks(), [&](int32_t rank) -> Result<int> {
    const cuda::DeviceScope scope(rank);
    WH_RETURN_IF_ERROR(scope.status());
    auto communicator = (*devices)->communicator(rank, nullptr);
    if (!communicator.ok()) return communicator.status();
    Result<int> code = main(**communicator, rank);
    if (!code.ok()) (*devices)->abort();
    return code;
  });
}

}  // namespace wh::cli
