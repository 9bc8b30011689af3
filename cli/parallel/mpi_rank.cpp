#include <fmt/format.h>
#include <mpi.h>

#include <chrono>
#include <new>
#include <thread>

#include "parallel/mpi/communicator.h"
#include "parallel/ranks.h"
#include "report/session.h"

namespace wh::cli {
namespace {

// MPI for as long as this lives.
class Session {
 public:
  Session() {
    MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &level_);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  }
  ~Session() { MPI_Finalize(); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  int rank = 0, ranks = 1;

 private:
  int level_ = 0;
};

}  // namespace

int run_mpi_rank(const Group& group, const RankMain& main) {
  const Session session;
  if (group.device != Device::kCpu) {
    return report(invalid("--parallel mpi takes --device cpu; GPUs have --parallel nccl"));
  }
  if (group.ranks != 0 && group.ranks != session.ranks) {
    return report(
        invalid(fmt::format("--ranks is {}; mpirun started {}", group.ranks, session.ranks)));
  }
  Result<int> code = kFine;
  try {
    sharded::MpiCommunicator communicator(MPI_COMM_WORLD);
    code = main(communicator, 0);
  } catch (const std::bad_alloc&) {
    code = Status(Code::kOutOfMemory, "not enough memory");
  }
  if (code.ok()) return *code;
  const Status& status = code.status();
  const int answer =
      report({status.code(), fmt::format("rank {}: {}", session.rank, status.message())});
  // Ranks that wait for this one would wait for good: what failed here may not have failed there.
  // Where it has, they say why before they are ended.
  if (status.code() != Code::kInvalidArgument && status.code() != Code::kRefused) {
    std::this_thread::sleep_for(std::chrono::seconds(1));
    MPI_Abort(MPI_COMM_WORLD, answer);
  }
  return answer;
}

}  // namespace wh::cli
