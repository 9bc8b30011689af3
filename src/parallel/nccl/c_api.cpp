#include "parallel/exported_communicator.h"
#include "parallel/nccl/communicator.h"
#include "widehead/parallel/nccl.h"

using wh::sharded::Communicator;
using wh::sharded::NcclCommunicator;
using wh::sharded::NcclConnection;

namespace {
// Of a communicator that does not block; another waits in NCCL for as long as it takes.
constexpr std::chrono::seconds kConnectTimeout{30};
}  // namespace

wh_status wh_nccl_communicator_create(ncclComm_t comm, cudaStream_t stream,
                                      wh_communicator* communicator, size_t size) {
  return wh::sharded::export_new(
      communicator, size,
      [&]() -> wh::Result<std::unique_ptr<NcclCommunicator>> {
        if (comm == nullptr) return wh::invalid("comm is null");
        const auto library = wh::sharded::nccl();
        if (!library.ok()) return library.status();
        auto connection = NcclConnection::make(**library, comm);
        if (!connection.ok()) return connection.status();
        return NcclCommunicator::make(*connection, stream);
      },
      [](NcclCommunicator& made) {
        NcclCommunicator* const one[] = {&made};
        return NcclCommunicator::connect(one, Communicator::Clock::now() + kConnectTimeout);
      });
}

void wh_nccl_communicator_destroy(wh_communicator* communicator) {
  wh::sharded::destroy_exported(communicator);
}
