#include "parallel/exported_communicator.h"
#include "parallel/mpi/communicator.h"
#include "widehead/parallel/mpi.h"

using wh::sharded::MpiCommunicator;

wh_status wh_mpi_communicator_create(MPI_Comm comm, wh_communicator* communicator, size_t size) {
  return wh::sharded::export_new(
      communicator, size,
      [&]() -> wh::Result<std::unique_ptr<MpiCommunicator>> {
        if (comm == MPI_COMM_NULL) return wh::invalid("comm is MPI_COMM_NULL");
        // Whatever else is called at another time ends the program.
        int has_begun = 0, has_ended = 0;
        if (MPI_Initialized(&has_begun) != MPI_SUCCESS || has_begun == 0) {
          return wh::invalid("MPI has not been started");
        }
        if (MPI_Finalized(&has_ended) != MPI_SUCCESS || has_ended != 0) {
          return wh::invalid("MPI has been ended");
        }
        return std::make_unique<MpiCommunicator>(comm);
      },
      [](MpiCommunicator&) { return wh::Status(); });
}

void wh_mpi_communicator_destroy(wh_communicator* communicator) {
  wh::sharded::destroy_exported(communicator);
}
