#include "parallel/exported_communicator.h"
#include "parallel/nccl/communicator.h"
#include "widehead/parallel/nccl.h"

using wh::sharded::Communicator;
using wh::sharded::NcclCommunicator;

wh_status wh_nccl_communicator_create(ncclComm_t comm, cudaStream_t stream,
                                      wh_communicator* communicator, size_t size) {
  return wh::sharded::export_new(communicator, size,
                                 [&]() -> wh::Result<std::unique_ptr<Communicator>> {
                                   if (comm == nullptr) return wh::invalid("comm is null");
                                   auto made = NcclCommunicator::make(comm, stream);
                                   if (!made.ok()) return made.status();
                                   return std::unique_ptr<Communicator>(std::move(*made));
                                 });
}

void wh_nccl_communicator_destroy(wh_communicator* communicator) {
  wh::sharded::destroy_exported(communicator);
}
