/* The ranks of an MPI communicator as wh_parallel_plan_create() takes them, whose tensors are host
 * memory. Of the library widehead_parallel, which was built with one MPI: it must be the program's.
 */
#ifndef WIDEHEAD_PARALLEL_MPI_H_
#define WIDEHEAD_PARALLEL_MPI_H_

#include <mpi.h>
#include <widehead/parallel.h>

#ifdef __cplusplus
extern "C" {
#endif

/* `comm` stays the caller's and must outlive what is made of it: `*communicator`, of `size` bytes.
 * While a plan is made or runs its messages are the library's alone; its errors are answers
 * (MPI_ERRORS_RETURN) until `*communicator` is destroyed, which MPI_Finalize() must not precede.
 * After a failure `comm` may hold messages that nobody received, which another communicator made of
 * it would take for its own: make that of another, as MPI_Comm_dup() has it before the failure.
 * Messages move beside the work where MPI was started with MPI_THREAD_SERIALIZED or more, and
 * between steps where it was with less. */
WH_API wh_status wh_mpi_communicator_create(MPI_Comm comm, wh_communicator* communicator,
                                            size_t size);
WH_API void wh_mpi_communicator_destroy(wh_communicator* communicator);

#ifdef __cplusplus
}
#endif

#endif
