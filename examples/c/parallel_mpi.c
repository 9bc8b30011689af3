/* One attention over the ranks of MPI: each makes its part of a long K and V and of the queries,
 * all attend together, and the last rank compares its last row with what it computes alone.
 *
 *   mpirun -n 2 parallel_mpi
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <widehead/parallel/mpi.h>

enum { kHeadsQ = 8, kHeadsKv = 2, kDim = 64, kTokens = 1000 };

static void check(wh_status status) {
  if (status == WH_OK) return;
  fprintf(stderr, "%s\n", wh_last_error());
  MPI_Abort(MPI_COMM_WORLD, 1);
}

static float* tensor(int64_t heads, int64_t tokens) {
  float* data = calloc((size_t)(heads * tokens * kDim) + 1, sizeof(float));
  if (data == NULL) MPI_Abort(MPI_COMM_WORLD, 1);
  return data;
}

/* [heads, tokens, dim], of the tokens from `begin` on. */
static float* part(int64_t heads, int64_t begin, int64_t tokens, int64_t seed) {
  float* data = tensor(heads, tokens);
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t d = 0; d < kDim; ++d) {
        const int64_t i = (h * kTokens + begin + t) * kDim + d;
        data[(h * tokens + t) * kDim + d] = (float)(i * seed % 127) / 64 - 1;
      }
    }
  }
  return data;
}

static void* workspace(uint64_t bytes) {
  const uint64_t most = bytes / WH_WORKSPACE_ALIGNMENT * WH_WORKSPACE_ALIGNMENT;
  return aligned_alloc(WH_WORKSPACE_ALIGNMENT, most + WH_WORKSPACE_ALIGNMENT);
}

static wh_tensors tensors_of(const float* q, const float* k, const float* v, float* out,
                             uint64_t workspace_bytes) {
  wh_tensors tensors;
  check(wh_tensors_init(&tensors, sizeof(tensors)));
  tensors.q = q;
  tensors.k = k;
  tensors.v = v;
  tensors.out = out;
  tensors.workspace_bytes = workspace_bytes;
  tensors.workspace = workspace(workspace_bytes);
  return tensors;
}

/* Of `problem`, whose queries are the last ones of all tokens, on this rank. */
static void attend_alone(const wh_problem* problem, float* out) {
  float* q = part(kHeadsQ, kTokens - problem->len_q, problem->len_q, 37);
  float* k = part(kHeadsKv, 0, kTokens, 59);
  float* v = part(kHeadsKv, 0, kTokens, 83);
  wh_plan* plan = NULL;
  check(wh_plan_create(problem, NULL, &plan));
  const wh_tensors tensors = tensors_of(q, k, v, out, wh_plan_workspace_bytes(plan));
  check(wh_plan_run(plan, &tensors, NULL));
  wh_plan_destroy(plan);
  free(tensors.workspace);
  free(q);
  free(k);
  free(v);
}

int main(int argc, char** argv) {
  int level = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_SERIALIZED, &level);
  wh_communicator group;
  check(wh_mpi_communicator_create(MPI_COMM_WORLD, &group, sizeof(group)));

  /* Who has which tokens: even parts, and what is left over with the last rank. */
  wh_token_range* tokens = calloc((size_t)group.ranks, sizeof(*tokens));
  if (tokens == NULL) MPI_Abort(MPI_COMM_WORLD, 1);
  for (int32_t r = 0; r < group.ranks; ++r) {
    tokens[r].begin = kTokens / group.ranks * r;
    tokens[r].end = r + 1 < group.ranks ? kTokens / group.ranks * (r + 1) : kTokens;
    tokens[r].rank = r;
  }
  wh_shards shards;
  check(wh_shards_init(&shards, sizeof(shards)));
  shards.ranks = group.ranks;
  shards.q = shards.k = tokens;
  shards.q_count = shards.k_count = (size_t)group.ranks;

  /* The whole, with the strides of this rank's tensors. */
  const int64_t begin = tokens[group.rank].begin, mine = tokens[group.rank].end - begin;
  wh_problem problem;
  check(wh_problem_init(&problem, sizeof(problem)));
  problem.heads_q = kHeadsQ;
  problem.heads_kv = kHeadsKv;
  problem.len_q = problem.len_k = mine;
  problem.dim_qk = problem.dim_v = kDim;
  problem.causal = WH_CAUSAL_BOTTOM_RIGHT;
  check(wh_problem_set_dense(&problem));
  problem.len_q = problem.len_k = kTokens;

  wh_parallel_plan* plan = NULL;
  check(wh_parallel_plan_create(&problem, &shards, NULL, &group, &plan));
  float* q = part(kHeadsQ, begin, mine, 37);
  float* k = part(kHeadsKv, begin, mine, 59);
  float* v = part(kHeadsKv, begin, mine, 83);
  float* out = tensor(kHeadsQ, mine);
  const wh_tensors tensors = tensors_of(q, k, v, out, wh_parallel_plan_workspace_bytes(plan));
  check(wh_parallel_plan_run(plan, &tensors, NULL));

  int is_wrong = 0;
  if (group.rank + 1 == group.ranks) {
    printf("%s\n", wh_parallel_plan_explain(plan));
    wh_problem last = problem;
    last.len_q = 1;
    check(wh_problem_set_dense(&last));
    float* want = tensor(kHeadsQ, 1);
    attend_alone(&last, want);
    float most = 0;
    for (int64_t h = 0; h < kHeadsQ; ++h) {
      for (int64_t d = 0; d < kDim; ++d) {
        const float difference = fabsf(out[(h * mine + mine - 1) * kDim + d] - want[h * kDim + d]);
        if (!(difference <= most)) most = difference; /* NaN too */
      }
    }
    is_wrong = !(most < 1e-5f);
    printf("largest difference from one rank alone: %.1e\n", most);
    free(want);
  }
  wh_parallel_plan_destroy(plan);
  wh_mpi_communicator_destroy(&group);
  free(tokens);
  free(tensors.workspace);
  free(q);
  free(k);
  free(v);
  free(out);
  MPI_Finalize();
  return is_wrong;
}
