#include "parallel/exported_communicator.h"
#include "parallel/mpi/communicator.h"
#include "widehead/parallel/mpi.h"

using wh::sharded::Communicator;
using wh::sharded::MpiCommunicator;

wh_status wh_mpi_communicator_create(MPI_Comm comm, wh_communicator* communicator, size_t size) {
  return wh::sharded::export_new(
      communicator, size, [&]() -> wh::Result<std::unique_ptr<Communicator>> {
        int is_there = 0;
        if (comm == MPI_COMM_NULL || MPI_Initialized(&is_there) != MPI_SUCCESS || is_there == 0) {
          return wh::invalid(comm == MPI_COMM_NULL ? "comm is MPI_COMM_NULL"
                                                   : "MPI has not been started");
        }
        return std::unique_ptr<Communicator>(std::make_unique<MpiCommunicator>(comm));
      });
}

void wh_mpi_communicator_destroy(wh_communicator* communicator) {
  wh::sharded::destroy_exported(communicator);
}
