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
 * beside it. After a time-out the caller should abort `comm`: NCCL's kernels wait for good. */
WH_API wh_status wh_nccl_communicator_create(ncclComm_t comm, cudaStream_t stream,
                                             wh_communicator* communicator, size_t size);
WH_API void wh_nccl_communicator_destroy(wh_communicator* communicator);

#ifdef __cplusplus
}
#endif

#endif
