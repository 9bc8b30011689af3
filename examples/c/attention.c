/* Grouped-query attention from C: plan, print the plan, run. */
#include <stdio.h>
#include <stdlib.h>
#include <widehead/widehead.h>

static void check(wh_status status) {
  if (status == WH_OK) return;
  fprintf(stderr, "%s\n", wh_last_error());
  exit(1);
}

static float* tensor(size_t count, float value) {
  float* data = malloc(count * sizeof(float));
  if (data == NULL) exit(1);
  for (size_t i = 0; i < count; ++i) data[i] = value * (float)(i % 7);
  return data;
}

int main(void) {
  wh_problem problem;
  check(wh_problem_init(&problem, sizeof(problem)));
  problem.heads_q = 8;
  problem.heads_kv = 2;
  problem.len_q = 16;
  problem.len_k = 128;
  problem.dim_qk = problem.dim_v = 256;
  problem.causal = WH_CAUSAL_BOTTOM_RIGHT;
  check(wh_problem_set_dense(&problem));

  wh_plan* plan = NULL;
  check(wh_plan_create(&problem, NULL, &plan));
  printf("%s\n", wh_plan_explain(plan));

  wh_tensors tensors;
  check(wh_tensors_init(&tensors, sizeof(tensors)));
  float* q = tensor(8 * 16 * 256, 0.1f);
  float* k = tensor(2 * 128 * 256, 0.1f);
  float* v = tensor(2 * 128 * 256, 1.0f);
  float* out = tensor(8 * 16 * 256, 0.0f);
  tensors.q = q;
  tensors.k = k;
  tensors.v = v;
  tensors.out = out;
  tensors.workspace_bytes = wh_plan_workspace_bytes(plan);
  /* A multiple of the alignment, as aligned_alloc() wants it. */
  tensors.workspace =
      aligned_alloc(WH_WORKSPACE_ALIGNMENT, (tensors.workspace_bytes + WH_WORKSPACE_ALIGNMENT - 1) /
                                                WH_WORKSPACE_ALIGNMENT * WH_WORKSPACE_ALIGNMENT);
  check(wh_plan_run(plan, &tensors, NULL));
  printf("out[0] = %f\n", out[0]);

  wh_plan_destroy(plan);
  free(tensors.workspace);
  free(q);
  free(k);
  free(v);
  free(out);
  return 0;
}
