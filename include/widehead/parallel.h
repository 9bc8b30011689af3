/* One attention over several ranks, each with a part of the tokens of q, k and v: what widehead.h
 * has, for a group. The library has no transport: the caller brings a wh_communicator, functions
 * that send and receive, over whatever connects the ranks. The optional library widehead_parallel
 * makes one of an MPI_Comm (parallel/mpi.h) or an ncclComm_t (parallel/nccl.h). docs/parallel.md
 * says how it is shared.
 *
 * Making a plan and running it are collective: every rank calls them, in the same order.
 */
#ifndef WIDEHEAD_PARALLEL_H_
#define WIDEHEAD_PARALLEL_H_

#include <widehead/widehead.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Of this rank to another, or from it. */
typedef struct wh_transfer {
  void* data;
  int64_t bytes; /* at least 1 */
  int32_t peer;
  int32_t is_send;
} wh_transfer;

/* What connects this rank with the others. The functions answer with a wh_status; none is called
 * from two threads at once, and none may throw. The caller owns it, and it must outlive the plans
 * that were made with it. */
typedef struct wh_communicator {
  size_t size; /* of this struct; set by wh_communicator_init() */
  void* context;
  int32_t rank, ranks;
  double timeout_s; /* of one wait for other ranks (30) */
  /* Sends and receives at once, without waiting. Transfers between two ranks meet in the order in
   * which both start them. On CUDA they follow what the run's stream holds by now, and memory is
   * the device's; under a negative number it is the host's. */
  int32_t (*start)(void* context, int32_t exchange, const wh_transfer* transfers, size_t count);
  /* Waits for what start() began under this number: on CUDA by the run's stream, for memory of the
   * host by the calling thread. WH_DEVICE_ERROR when the time is over; the connection is of no more
   * use then. */
  int32_t (*finish)(void* context, int32_t exchange, double timeout_s);
  /* Called now and then while the rank computes, from any thread, for connections that move only
   * when they are asked to; NULL: there is no need. */
  void (*poll)(void* context);
  /* What went wrong in the last call that failed; NULL: its name has to do. */
  const char* (*error)(void* context);
  /* This rank failed and its memory may go: what it has in flight ends, and the others hear of it,
   * as far as that is in the connection's power, which is of no more use then. Called once or more
   * often. NULL: the others wait until their time-out. */
  void (*give_up)(void* context);
} wh_communicator;

/* Tokens that lie side by side in a rank's tensors. */
typedef struct wh_token_range {
  int64_t begin, end;
  int32_t rank;
} wh_token_range;

/* Which rank has which tokens: any number of ranges a rank, in the order in which its tensors hold
 * them, none at all too. Each token belongs to one rank. All of it is the same on every rank. */
typedef struct wh_shards {
  size_t size; /* of this struct; set by wh_shards_init() */
  int32_t ranks;
  const wh_token_range* q;
  size_t q_count;
  const wh_token_range* k; /* and of v */
  size_t k_count;
  const int32_t*
      key_lengths; /* host memory [batch], of the whole; read where the problem uses them */
  const int32_t* key_starts;
  /* What connects the ranks, each way. 0: measured, in a fraction of a second. */
  double link_gbytes_per_s, link_latency_us;
  /* "ring", "gather", "heads", "queries" or "one_rank"; NULL: the planner chooses */
  const char* strategy;
} wh_shards;

typedef struct wh_parallel_plan wh_parallel_plan;

/* For whoever writes a communicator: leaves a copy of the message in wh_last_error(), and answers
 * with the status, which must be an error's. */
WH_API wh_status wh_fail(wh_status status, const char* message);
WH_API wh_status wh_communicator_init(wh_communicator* communicator, size_t size);
WH_API wh_status wh_shards_init(wh_shards* shards, size_t size);

/* `whole` is of all tokens, but its strides of q, k, v and out are those of this rank's tensors;
 * the mask and the sinks every rank has whole. Every rank agrees, or every rank gets an error that
 * names a rank and what it said otherwise. Forward, of 16-bit or f32 elements, q dense, k and v
 * dense or paged: pages, strides of them and stride_page_table are this rank's, and row b of its
 * table lists where the tokens of its ranges lie for sequence b, one after another.
 * communicator NULL: a plan that says what rank 0 would do, and cannot run; it needs a link. */
WH_API wh_status wh_parallel_plan_create(const wh_problem* whole, const wh_shards* shards,
                                         const wh_limits* limits,
                                         const wh_communicator* communicator,
                                         wh_parallel_plan** plan);
WH_API void wh_parallel_plan_destroy(wh_parallel_plan* plan);
WH_API const char* wh_parallel_plan_strategy(const wh_parallel_plan* plan);
WH_API uint64_t wh_parallel_plan_workspace_bytes(const wh_parallel_plan* plan); /* of this rank */
WH_API double wh_parallel_plan_estimated_us(const wh_parallel_plan* plan);
/* Every strategy with its verdict, reason, workspace and estimate. Owned by the plan. */
WH_API const char* wh_parallel_plan_explain(const wh_parallel_plan* plan);
/* `tensors` are this rank's, without key lengths and starts. One run of a plan at a time. On CUDA
 * it returns when the work is on the stream. A rank that fails, by its arguments too, gives up the
 * connection: the others hear of it, or wait until their time-out and say for whom. */
WH_API wh_status wh_parallel_plan_run(wh_parallel_plan* plan, const wh_tensors* tensors,
                                      const wh_run_options* options);

#ifdef __cplusplus
}
#endif

#endif
