#include "parallel/ranks.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <new>
#include <set>
#include <thread>
#include <vector>

#include "parallel/threads/group.h"
#include "report/session.h"

namespace wh::cli {

void add_transport_flag(CLI::App& app, std::string& transport) {
  app.add_option("--parallel", transport,
                 "ranks are processes of mpirun's (mpi), a CUDA device each (nccl), or threads on "
                 "one device (threads)")
      ->check([](const std::string& text) {
        return kTransports.value(text)
                   ? ""
                   : fmt::format("it is \"{}\"; valid: {}", text, kTransports.list());
      })
      ->group("PARALLEL");
}

int run_rank_threads(int32_t ranks, const std::function<Result<int>(int32_t)>& main) {
  std::vector<Result<int>> answers(static_cast<size_t>(ranks), Result<int>(kFine));
  std::vector<std::thread> threads;
  for (int32_t rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      auto& answer = answers[static_cast<size_t>(rank)];
      try {
        answer = main(rank);
      } catch (const std::bad_alloc&) {
        answer = Status(Code::kOutOfMemory, "not enough memory");
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  int worst = kFine;
  std::set<std::string> said;  // most errors are everybody's
  for (int32_t rank = 0; rank < ranks; ++rank) {
    const auto& answer = answers[static_cast<size_t>(rank)];
    if (answer.ok()) {
      worst = std::max(worst, *answer);
    } else if (said.insert(answer.status().message()).second) {
      worst =
          std::max(worst, report({answer.status().code(),
                                  fmt::format("rank {}: {}", rank, answer.status().message())}));
    }
  }
  return worst;
}

int run_ranks(const Group& group, const RankMain& main) {
  switch (group.transport) {
    case Transport::kMpi:
      return run_mpi_rank(group, main);
    case Transport::kNccl:
      return run_nccl_ranks(group, main);
    case Transport::kThreads:
      break;
  }
  if (group.ranks == 0) return report(invalid("--ranks is missing: how many threads are ranks"));
  sharded::ThreadGroup threads(group.ranks, group.device, group.device_index);
  return run_rank_threads(group.ranks, [&](int32_t rank) {
    sharded::ThreadGroup::Member member(threads, rank);
    return main(member, group.device_index);
  });
}

}  // namespace wh::cli
