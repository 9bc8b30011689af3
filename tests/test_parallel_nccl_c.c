/* The C functions of widehead_parallel for NCCL, as far as no GPU is needed: that a C program
 * compiles and links, and what they answer without a communicator. */
#include <widehead/parallel/nccl.h>

#include "support/expect_invalid.h"

int main(void) {
  wh_communicator group;
  int wrong = expect_invalid(wh_nccl_communicator_create(NULL, NULL, &group, sizeof(group)),
                             "comm is null");
  wrong += expect_invalid(wh_nccl_communicator_create(NULL, NULL, NULL, sizeof(group)),
                          "communicator is null");
  wh_nccl_communicator_destroy(&group); /* of a failure there is nothing to destroy */
  wh_nccl_communicator_destroy(NULL);
  return wrong;
}
