#include "parallel/mpi_run.h"
#include "report/session.h"

namespace wh::cli {

int run_over_mpi(const MpiRun&) {
  return report(
      {Code::kRefused, "this build has no MPI; configure with -DWIDEHEAD_PARALLEL_MPI=ON"});
}

}  // namespace wh::cli
