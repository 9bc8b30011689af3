/* What the C functions of widehead_parallel for MPI answer to calls that are wrong. That good ones
 * work, examples/c/parallel_mpi.c shows. */
#include <widehead/parallel/mpi.h>

#include "support/expect_invalid.h"

int main(int argc, char** argv) {
  wh_communicator group;
  int wrong = expect_invalid(wh_mpi_communicator_create(MPI_COMM_WORLD, &group, sizeof(group)),
                             "MPI has not been started");
  MPI_Init(&argc, &argv);
  wrong += expect_invalid(wh_mpi_communicator_create(MPI_COMM_NULL, &group, sizeof(group)),
                          "comm is MPI_COMM_NULL");
  wrong += expect_invalid(wh_mpi_communicator_create(MPI_COMM_WORLD, NULL, sizeof(group)),
                          "communicator is null");
  wrong += expect_invalid(
      wh_mpi_communicator_create(MPI_COMM_WORLD, &group, 3),
      "size is 3; wh_communicator_init() sets it to sizeof(wh_communicator), 64 to 65536");
  wh_mpi_communicator_destroy(&group); /* of a failure there is nothing to destroy */
  wh_mpi_communicator_destroy(NULL);
  if (wh_mpi_communicator_create(MPI_COMM_WORLD, &group, sizeof(group)) != WH_OK) ++wrong;
  if (group.ranks != 1 || group.rank != 0 || group.context == NULL) ++wrong;
  wh_mpi_communicator_destroy(&group);
  if (group.context != NULL) ++wrong;
  MPI_Finalize();
  wrong += expect_invalid(wh_mpi_communicator_create(MPI_COMM_WORLD, &group, sizeof(group)),
                          "MPI has been ended");
  return wrong;
}
