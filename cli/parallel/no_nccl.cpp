#include "parallel/ranks.h"
#include "report/session.h"

namespace wh::cli {

int run_nccl_ranks(const Group&, const RankMain&) {
  return report(
      {Code::kRefused, "this build has no NCCL; configure with -DWIDEHEAD_PARALLEL_NCCL=ON"});
}

}  // namespace wh::cli
