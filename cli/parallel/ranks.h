// This process's ranks of a group: one of mpirun's, or a thread for each.
#pragma once

#include <functional>
#include <string>

#include "core/names.h"
#include "core/status.h"
#include "parallel/communicator.h"

namespace CLI {
class App;
}

namespace wh::cli {

enum class Transport : uint8_t {
  kMpi,      // this process is one of mpirun's
  kNccl,     // a thread for each CUDA device of this host
  kThreads,  // threads on one device, with copies for messages: a stand-in for the others
};
constexpr Names<Transport, 3> kTransports{{"mpi", "nccl", "threads"}};

// --parallel, one of these names.
void add_transport_flag(CLI::App& app, std::string& transport);

// What each rank does, on its device; answers with an exit code, the same on every rank.
using RankMain =
    std::function<Result<int>(sharded::Communicator& communicator, int32_t device_index)>;

struct Group {
  Transport transport;
  int32_t ranks = 0;  // 0: mpirun's, or as many as there are CUDA devices
  Device device = Device::kCpu;
  int32_t device_index = 0;  // of threads
};

// As this process's ranks; reports what failed, and answers with the exit code.
int run_ranks(const Group& group, const RankMain& main);

// One file each, or one that says that the build has none.
int run_mpi_rank(const Group& group, const RankMain& main);
int run_nccl_ranks(const Group& group, const RankMain& main);
// main(rank) on a thread for each rank.
int run_rank_threads(int32_t ranks, const std::function<Result<int>(int32_t rank)>& main);

}  // namespace wh::cli
