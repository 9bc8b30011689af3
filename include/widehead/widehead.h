/* Widehead: exact scaled dot-product attention for any head dimension, planned before it runs.
 *
 *   out = softmax(mask(softcap(scale * q k^T))) v
 *
 * and its gradients. A wh_problem says what is to be computed, wh_limits what the caller allows;
 * wh_plan_create() makes a plan of the two, which can be printed, stored and run any number of
 * times, from any thread.
 *
 * Every function that can fail answers with a wh_status and leaves a message that names the
 * argument, its value and what would be valid in wh_last_error(). Nothing prints, exits, aborts or
 * throws. Structs carry their own size, so that fields can be added to their end: initialise them
 * with the matching wh_*_init(), and a program compiled against an older or newer header works as
 * long as it leaves alone what the library does not have.
 */
#ifndef WIDEHEAD_WIDEHEAD_H_
#define WIDEHEAD_WIDEHEAD_H_

#include <stddef.h>
#include <stdint.h>

#define WH_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef enum wh_status {
  WH_OK = 0,
  WH_INVALID_ARGUMENT = 1, /* the message says which, its value and what is valid */
  WH_REFUSED = 2,          /* the limits allow no kernel; the message lists every candidate */
  WH_OUT_OF_MEMORY = 3,
  WH_DEVICE_ERROR = 4, /* the message names the driver's call */
  WH_CANCELLED = 5,
  WH_INTERNAL_ERROR = 6
} wh_status;

enum wh_device { WH_CPU = 0, WH_CUDA = 1 };
enum wh_dtype { WH_F32 = 0, WH_F16 = 1, WH_BF16 = 2 };
/* Bottom-right: query i sees key j when j <= i + len_k - len_q. Top-left: when j <= i. */
enum wh_causal { WH_CAUSAL_NONE = 0, WH_CAUSAL_BOTTOM_RIGHT = 1, WH_CAUSAL_TOP_LEFT = 2 };
/* Boolean masks are one byte an element, nonzero attends. Additive ones are added to the scores;
 * minus infinity masks the key, a finite number never does. WH_MASK_ADDITIVE is of q's type. */
enum wh_mask {
  WH_MASK_NONE = 0,
  WH_MASK_BOOLEAN = 1,
  WH_MASK_ADDITIVE_F32 = 2,
  WH_MASK_ADDITIVE = 3
};
/* Backward: from q, k, v, out, log_sum_exp and d_out, the gradient of out, to those of q, k, v and
 * the sinks. A mask has none: it is taken as a constant. */
enum wh_pass { WH_FORWARD = 0, WH_BACKWARD = 1 };
/* Packed: the tokens of all sequences one after another. Paged: keys in pages of a pool, listed by
 * a table. docs/serving.md has a picture. */
enum wh_query_layout { WH_QUERIES_DENSE = 0, WH_QUERIES_PACKED = 1 };
enum wh_key_layout { WH_KEYS_DENSE = 0, WH_KEYS_PACKED = 1, WH_KEYS_PAGED = 2 };
/* How K and V are stored. E4m3: bytes of 4 exponent and 3 mantissa bits, highest 448, no infinity.
 * Int8: symmetric, -128 to 127. Q8_0 and q4_0: ggml's blocks of 32 elements of a row, 34 and 18
 * bytes with their f16 scale; dimensions and strides are multiples of 32, still in elements. */
enum wh_quantised { WH_NOT_QUANTISED = 0, WH_E4M3 = 1, WH_INT8 = 2, WH_Q8_0 = 3, WH_Q4_0 = 4 };
/* What shares one f32 scale of e4m3 or int8: code times scale, rounded to f32, is the element.
 * Without scales it is the code. */
enum wh_scales {
  WH_SCALES_NONE = 0,
  WH_SCALES_TENSOR = 1,     /* [1] */
  WH_SCALES_HEAD = 2,       /* [batch, heads_kv] */
  WH_SCALES_TOKEN_HEAD = 3, /* as keys are stored, [batch, heads_kv, len_k] or [pages, heads_kv,
                               page_size]; those of absent keys are not read */
  WH_SCALES_CHANNEL = 4     /* [batch, heads_kv, 1, dim_qk], or dim_v */
};
enum wh_policy { WH_AUTOMATIC = 0, WH_FUSED = 1, WH_FUSED_ABOVE = 2 };
enum wh_precision { WH_NATIVE = 0, WH_HIGH = 1 };

/* Optional tensors, results and properties of a problem, combined with |. */
enum wh_uses {
  WH_USES_SINKS = 1,       /* f32 [heads_q]: one more logit a head, in the denominator only */
  WH_USES_KEY_LENGTHS = 2, /* int32 [batch], 0..len_k: keys from there on are not read, and the
                              diagonal of causal and window is aligned to the length */
  WH_USES_KEY_STARTS = 4,  /* int32 [batch], >= 0: keys before it are not read */
  WH_USES_LOG_SUM_EXP = 8, /* f32 [batch, heads_q, len_q], of packed queries [total_q, heads_q],
                              contiguous: natural log, written. The backward pass always reads
                              it */
  WH_USES_VALUES_IN_KEYS =
      16,                    /* v is the first dim_v columns of k, as in absorbed latent attention:
                               stride_v equals stride_k, v is NULL or k, and K is read once */
  WH_USES_PAGE_OFFSETS = 32, /* int32 [batch + 1]: the page table is one list, of which sequence b
                                has those from page_offsets[b] on, to before page_offsets[b + 1] */
  WH_USES_F32_OUT = 64       /* out is f32, whatever q is: for parts that wh_merge() will merge */
};

#define WH_UNLIMITED (-1)                   /* a window side that hides nothing */
#define WH_NO_BYTE_LIMIT ((uint64_t)-1)     /* a workspace of any size */
#define WH_WORKSPACE_ALIGNMENT ((size_t)64) /* of wh_tensors.workspace, in bytes */

/* q [batch, heads_q, len_q, dim_qk], k [batch, heads_kv, len_k, dim_qk], v [batch, heads_kv,
 * len_k, dim_v], out [batch, heads_q, len_q, dim_v], mask [batch, heads_q, len_q, len_k]. Strides
 * are in elements, in that order, not negative; 0 broadcasts; those of a dimension of 1 may be
 * anything. heads_q is a multiple of heads_kv; query head h reads kv head h / (heads_q /
 * heads_kv). Dimensions are 1..1024, other sizes 0 (heads: 1)..2^31-1.
 *
 * Packed queries: q and out are [total_q, heads_q, dim] by strides [2], [1] and [3]; [0] may be
 * anything. Packed keys: the same with total_k. Paged keys: k and v are [pages, heads_kv,
 * page_size, dim], stride [0] is a page's. Batch, len_q, len_k, total_q and total_k are then the
 * most that a run may have. */
typedef struct wh_problem {
  size_t size; /* of this struct; set by wh_problem_init() */
  int32_t device;
  int32_t device_index;
  int32_t dtype_q;  /* of q, and of out without WH_USES_F32_OUT */
  int32_t dtype_kv; /* of k and v, where they are not quantised */
  int64_t batch, heads_q, heads_kv, len_q, len_k, dim_qk, dim_v;
  int64_t stride_q[4], stride_k[4], stride_v[4], stride_out[4], stride_mask[4];
  float scale;   /* finite; wh_problem_set_dense() sets 1 / sqrt(dim_qk) */
  float softcap; /* 0: none; else scores become softcap * tanh(score / softcap) before masks */
  int32_t causal;
  int32_t mask;
  int64_t window_left;  /* keys left of the diagonal that stay visible, or WH_UNLIMITED */
  int64_t window_right; /* the same to the right; causal makes it 0 */
  uint32_t uses;        /* of enum wh_uses */
  /* Of the backward pass: d_out is of out's shape and type, dq of q's, dk of k's, dv of v's. */
  int64_t stride_d_out[4], stride_dq[4], stride_dk[4], stride_dv[4];
  int32_t pass; /* of enum wh_pass */
  /* Of packed queries and keys and of paged keys; 0 in dense ones. */
  int64_t total_q, total_k;  /* tokens of all sequences together */
  int64_t page_size, pages;  /* keys of a page, and pages of the pool */
  int64_t page_entries;      /* of the page table, with WH_USES_PAGE_OFFSETS */
  int64_t stride_page_table; /* without: from a sequence's row to the next's, of ceil(len_k /
                                page_size) pages each */
  int32_t query_layout;      /* of enum wh_query_layout */
  int32_t key_layout;        /* of enum wh_key_layout; paged needs WH_USES_KEY_LENGTHS */
  /* Of the forward pass. Strides of scales are in elements, ordered batch, kv head, key
   * and column, 0 broadcasts; where scales do not differ they may be anything. */
  int32_t quantised_k, quantised_v; /* of enum wh_quantised; v that lies in k is as k */
  int32_t scales_k, scales_v;       /* of enum wh_scales */
  int64_t stride_scales_k[4], stride_scales_v[4];
} wh_problem;

typedef struct wh_limits {
  size_t size;              /* of this struct; set by wh_limits_init() */
  uint64_t workspace_bytes; /* the most that a plan may take, or WH_NO_BYTE_LIMIT */
  int32_t policy;
  int32_t threads;         /* CPU threads; 0: every core */
  int64_t fused_above;     /* keys, for WH_FUSED_ABOVE: fused from there on, 0: always */
  const char* kernel;      /* forces a kernel by name; NULL: the planner chooses */
  int32_t precision;       /* of the weights before they multiply v; see docs/semantics.md */
  double longest_step_us;  /* between two looks at the callback; CUDA: of a launch; 0: any */
  int32_t batch_invariant; /* 1: a row's bits do not depend on the batch around it */
  /* A promise for CUDA streams, or -1 for none: the kernel in front in the stream, and any that it
   * overlaps, write no keys but the last so many of each sequence, and no key lengths, key starts,
   * offsets or page tables. The rest may then be read before that kernel has ended. Too small an n
   * is a race. */
  int64_t fresh_keys;
} wh_limits;

/* Pointers for one run: host memory for a CPU problem, memory of the problem's device for a CUDA
 * one, each aligned to its elements. What the problem does not use stays NULL. What a run writes
 * (out and log_sum_exp, or the gradients) and the workspace's first bytes, as many as the plan
 * takes, must not overlap another tensor. */
typedef struct wh_tensors {
  size_t size; /* of this struct; set by wh_tensors_init() */
  const void* q;
  const void* k;
  const void* v;
  void* out;
  const void* mask;
  const float* sinks;
  const int32_t* key_lengths;
  const int32_t* key_starts;
  float* log_sum_exp;
  void* workspace; /* at least the plan's bytes, aligned to WH_WORKSPACE_ALIGNMENT */
  size_t workspace_bytes;
  /* Of the backward pass, which reads out and log_sum_exp as the forward pass wrote them. */
  const void* d_out; /* the gradient of out */
  void* dq;
  void* dk;
  void* dv;                     /* NULL where v lies in k: its gradient is then part of dk */
  float* d_sinks;               /* [heads_q] */
  const int32_t* query_offsets; /* [batch + 1], ascending from 0: where each sequence's begin */
  const int32_t* key_offsets;   /* the same of packed keys */
  const int32_t* page_table;    /* pages of each sequence, in order; those that no key length makes
                                   visible are not read, and neither is what their pages hold */
  const int32_t* page_offsets;
  /* What this run has of the plan's most: 0 is all of it. A plan runs any smaller batch. */
  int64_t batch;
  int64_t total_q; /* of packed queries: tokens that q and out have room for */
  const float* scales_k;
  const float* scales_v; /* NULL where v lies in k */
} wh_tensors;

/* Threads of the host program for CPU kernels: parallel() calls task(argument, i) once for every i
 * in [0, count), on any threads, and returns when all are done. A serial loop is valid. */
typedef struct wh_executor {
  void (*parallel)(void* context, int32_t count, void (*task)(void* argument, int32_t i),
                   void* argument);
  void* context;
} wh_executor;

typedef struct wh_run_options {
  size_t size;  /* of this struct; set by wh_run_options_init() */
  void* stream; /* a cudaStream_t of the problem's device; NULL: its default stream. CPU: ignored */
  const wh_executor* executor; /* NULL: oneTBB */
  /* Reports the fraction done between two steps, from any worker but never from two at once; it
   * never falls and ends at 1. Anything but 0 stops the run unless it had nothing left to do: it
   * answers WH_CANCELLED, and wh_last_error() says whether out is untouched or partly written. A
   * CUDA run then waits for its launches, returns when out is written, and cannot be captured. */
  int32_t (*progress)(void* context, double fraction);
  void* progress_context;
} wh_run_options;

/* Attention over a part of the keys, as a run with WH_USES_LOG_SUM_EXP and without sinks leaves it:
 * out [batch, heads_q, len_q, dim_v] and f32 natural log-sum-exps [batch, heads_q, len_q], strides
 * in elements. Where a log-sum-exp is minus infinity the row saw no key, and out is not read.
 * Log-sum-exps in base 2, which other libraries have, times log(2) = 0.6931472 are natural. */
typedef struct wh_partial {
  const void* out;
  const float* log_sum_exp;
  int64_t stride_out[4];
  int64_t stride_log_sum_exp[3];
  int32_t dtype;
} wh_partial;

/* What wh_merge() writes, with the names and ranges of wh_problem's. */
typedef struct wh_merged {
  size_t size;   /* of this struct; set by wh_merged_init() */
  int32_t dtype; /* of out; each part has a type of its own */
  int64_t batch, heads_q, len_q, dim_v;
  void* out;
  float* log_sum_exp; /* natural; NULL: not wanted */
  int64_t stride_out[4];
  int64_t stride_log_sum_exp[3];
  const float* sinks; /* f32 [heads_q]: joined once, here and not in the parts; NULL: none */
  int32_t device;     /* of enum wh_device: where out, the sinks and the parts are */
  int32_t device_index;
} wh_merged;

/* New keys and values, and the caches that wh_append() writes them into: k, v and the scales of a
 * wh_problem, which says how they lie. */
typedef struct wh_appended {
  size_t size; /* of this struct; set by wh_appended_init() */
  int64_t tokens;
  const void* new_k; /* [tokens, heads_kv, dim_qk] */
  const void* new_v; /* [tokens, heads_kv, dim_v]; not read where v lies in k */
  /* [tokens]: where each goes, page * page_size + its row there; of dense caches batch * len_k +
   * key, of packed ones the token. Negative: nowhere, the token is skipped. No two are the same. */
  const int64_t* slots;
  void* k;
  void* v;         /* not written where v lies in k */
  float* scales_k; /* WH_SCALES_TOKEN_HEAD: written, each row's own; else read */
  float* scales_v;
  int64_t stride_new_k[3], stride_new_v[3]; /* of a token, a head and an element */
  int32_t dtype; /* of new_k and new_v, which may be the cache's or not */
} wh_appended;

typedef struct wh_plan wh_plan;

WH_API const char* wh_version(void); /* "0.1.0" */
/* Of the last call of this thread that failed; "" before the first. Valid until the next failure.
 */
WH_API const char* wh_last_error(void);

/* Defaults: CPU, f32, batch 1, no masks, no window, sizes 0. `size` is sizeof(*problem) and so on.
 */
WH_API wh_status wh_problem_init(wh_problem* problem, size_t size);
WH_API wh_status wh_limits_init(wh_limits* limits, size_t size);
WH_API wh_status wh_tensors_init(wh_tensors* tensors, size_t size);
WH_API wh_status wh_run_options_init(wh_run_options* options, size_t size);
WH_API wh_status wh_merged_init(wh_merged* merged, size_t size);
WH_API wh_status wh_appended_init(wh_appended* appended, size_t size);
/* Sets every stride to that of a contiguous tensor (stride_v to stride_k where `uses` says that v
 * lies in k), those of gradients too, and scale to 1 / sqrt(dim_qk). */
WH_API wh_status wh_problem_set_dense(wh_problem* problem);

/* limits NULL: the defaults. Takes microseconds and reads no tensor. On WH_REFUSED *plan is a plan
 * that cannot run but can be explained; on any other failure it is NULL. */
WH_API wh_status wh_plan_create(const wh_problem* problem, const wh_limits* limits, wh_plan** plan);
WH_API void wh_plan_destroy(wh_plan* plan);
/* options NULL: the defaults. CPU: returns when out is written. CUDA without a progress callback:
 * returns when the work is on the stream; capturable in a graph. Does not allocate, but for
 * cuda_unfused's first run on a device, which starts cuBLASLt: a capture before it is
 * WH_DEVICE_ERROR. */
WH_API wh_status wh_plan_run(const wh_plan* plan, const wh_tensors* tensors,
                             const wh_run_options* options);
WH_API const char* wh_plan_kernel(const wh_plan* plan); /* "" when none is allowed */
WH_API uint64_t wh_plan_workspace_bytes(const wh_plan* plan);
WH_API double wh_plan_estimated_us(const wh_plan* plan);
/* What it was made for, into a struct that wh_problem_init() has set up. */
WH_API wh_status wh_plan_problem(const wh_plan* plan, wh_problem* problem);
/* Text for people and JSON for programs: the choice and every candidate with its verdict, reason,
 * workspace and estimate. Owned by the plan; NULL when memory ran out. */
WH_API const char* wh_plan_explain(const wh_plan* plan);
WH_API const char* wh_plan_json(const wh_plan* plan);
/* The inverse of wh_plan_json(), `length` bytes of text. A plan that this machine and version would
 * not make is WH_INVALID_ARGUMENT: plan again. */
WH_API wh_status wh_plan_from_json(const char* text, size_t length, wh_plan** plan);

/* Plans (cached by shape and limits) and runs the problem's pass. Without tensors->workspace it
 * allocates what the plan takes, for the time of the call; on CUDA in the order of the stream, from
 * a memory pool of its own, which keeps up to 32 MiB a device. */
WH_API wh_status wh_attention(const wh_problem* problem, const wh_limits* limits,
                              const wh_tensors* tensors, const wh_run_options* options);

/* Attention over all keys from that over parts of them:
 *   log_sum_exp = log(exp(sink) + sum_i exp(log_sum_exp_i))
 *   out         = sum_i exp(log_sum_exp_i - log_sum_exp) * out_i
 * summed in f32, in the order of the parts: the same parts give the same bits, for any number of
 * threads. Where no part saw a key out is 0 and the log-sum-exp that of the sink, or minus
 * infinity. out and log_sum_exp may be those of a part, with its type and strides, and otherwise
 * share no memory with one. CPU: done when it returns, and of the options takes the executor alone.
 * CUDA: on the options' stream; more than 32 parts take device memory for the time of the call.
 * Source: Dao et al., FlashAttention, 2022. */
WH_API wh_status wh_merge(const wh_merged* merged, const wh_partial* parts, size_t count,
                          const wh_run_options* options);

/* Writes new keys and values into caches that lie as `cache` says: its strides and layout,
 * dtype_kv, formats and scales of k and v; what it says of queries is not looked at. Rows of the
 * cache's type are copied bit by bit, others rounded to nearest even. E4m3 and int8 take the scales
 * that the caller has, or, where each token and head has its own, the one that gives the row's
 * largest element the highest code, which is stored; those of a head or a channel are all
 * sequences' alike (stride 0) where keys are packed or paged. CPU: done when it returns; of the
 * options takes the executor. CUDA: on the options' stream, capturable, the same bytes. Slots
 * beyond the cache are errors on the CPU; on CUDA, where nobody looks, their tokens are skipped. */
WH_API wh_status wh_append(const wh_problem* cache, const wh_appended* appended,
                           const wh_run_options* options);

/* Hands one line for each new plan (problem, kernel, workspace, time, the next best) to `log`, from
 * the thread that plans and never from two at once. It may plan, which makes no lines then, but
 * must not wait for another thread that plans. NULL: lines go to stderr where the environment says
 * WIDEHEAD_LOG=plan, and nowhere otherwise. */
WH_API void wh_set_plan_log(void (*log)(void* context, const char* line), void* context);

/* The forward pass's kernels of a device kind in the order in which the planner offers them; NULL
 * past the last. A plan of the backward pass names that pass's. */
WH_API const char* wh_kernel_name(int32_t device, size_t index);
WH_API const char* wh_kernel_summary(int32_t device, size_t index);
/* What the planner knows of a device, as a JSON object. Valid until the thread's next such call;
 * NULL on failure. */
WH_API const char* wh_device_json(int32_t device, int32_t device_index);

#ifdef __cplusplus
}
#endif

#endif
