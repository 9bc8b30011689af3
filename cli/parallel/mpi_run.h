// `widehead run --parallel mpi`: this process as one of mpirun's.
#pragma once

#include "input/parallel_flags.h"

namespace wh::cli {

struct MpiRun {
  Request request;
  Limits limits;
  ParallelFlags flags;
  uint64_t seed = 1;
  bool json = false;
};

// Answers with the exit code, the same on every rank. A build without MPI says so.
int run_over_mpi(const MpiRun& run);

}  // namespace wh::cli
