#include "parallel/ranks.h"
#include "report/session.h"

namespace wh::cli {

int run_mpi_rank(const Group&, const RankMain&) {
  return report(
      {Code::kRefused, "this build has no MPI; configure with -DWIDEHEAD_PARALLEL_MPI=ON"});
}

}  // namespace wh::cli
