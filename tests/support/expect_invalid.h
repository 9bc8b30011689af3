/* For tests that are C programs. */
#pragma once

#include <stdio.h>
#include <string.h>
#include <widehead/widehead.h>

/* 0, or 1 and what came instead. */
static inline int expect_invalid(wh_status status, const char* message) {
  if (status == WH_INVALID_ARGUMENT && strcmp(wh_last_error(), message) == 0) return 0;
  fprintf(stderr, "status %d: \"%s\"; wanted \"%s\"\n", (int)status, wh_last_error(), message);
  return 1;
}
