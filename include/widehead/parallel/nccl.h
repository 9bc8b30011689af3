/* The ranks of an NCCL communicator as wh_parallel_plan_create() takes them, a CUDA device each. Of
 * the library widehead_parallel, which links no NCCL: it finds what the program has loaded.
 */
#ifndef WIDEHEAD_PARALLEL_NCCL_H_
#define WIDEHEAD_PARALLEL_NCCL_H_

#include <cuda_runtime_api.h>
#include <nccl.h>
#include <widehead/parallel.h>

#ifdef __cplusplus
extern "C" {
#endif

/* `comm` and `stream` stay the caller's and must outlive what is made of them: `*communicator`, of
 * `size` bytes. Plans run on that stream, wh_run_options.stream; messages have one of their own
 * beside it.
 *
 * Collective, as ncclCommInitRank() is: it connects `comm` with every rank, for which NCCL waits as
 * it does there, or for 30 s where `comm` does not block. What is awaited thereafter has the
 * time-out of the communicator. One thread that makes those of several ranks would wait for itself:
 * each has a process or a thread. After a time-out, of this function too, the caller should abort
 * `comm`, before it destroys `*communicator` or frees other memory of its device: NCCL's kernels
 * wait for good, and what frees memory waits for them. An aborted `comm` is not asked for anything
 * by that destruction. Where this function fails it leaves a `*communicator` that no plan takes; it
 * is destroyed as ever, and only that frees what was made of it. */
WH_API wh_status wh_nccl_communicator_create(ncclComm_t comm, cudaStream_t stream,
                                             wh_communicator* communicator, size_t size);
WH_API void wh_nccl_communicator_destroy(wh_communicator* communicator);

#ifdef __cplusplus
}
#endif

#endif
