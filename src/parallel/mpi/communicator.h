// Ranks of an MPI communicator, whose tensors are host memory.
#pragma once

#include <mpi.h>

#include <map>
#include <vector>

#include "parallel/communicator.h"

namespace wh::sharded {

class MpiCommunicator final : public Communicator {
 public:
  // The communicator stays the caller's and must outlive this; its messages are this one's alone
  // while a run lasts. MPI must have been started so that one thread at a time may call it
  // (MPI_THREAD_SERIALIZED) for messages to move beside the work; with less they move between
  // steps.
  explicit MpiCommunicator(MPI_Comm comm);
  ~MpiCommunicator() override;

  int32_t rank() const override { return rank_; }
  int32_t ranks() const override { return ranks_; }
  Status start(int32_t exchange, std::span<const Transfer> transfers) override;
  Status finish(int32_t exchange, Clock::time_point deadline) override;
  void poll() override;
  // Its receives end, and the others hear of it in their next start() or finish().
  void give_up() override;

 private:
  struct Pending {
    std::vector<MPI_Request> requests;
    std::vector<Transfer> transfers;  // of each request
  };
  Status check(int error, const char* call) const;
  void abandon();
  // That this rank or another gave up.
  Status given_up();

  MPI_Comm comm_;
  MPI_Errhandler callers_errors_;  // what the caller had, until this ends
  int32_t rank_ = 0, ranks_ = 1;
  bool may_poll_ = false;
  Status failure_;  // once a rank gave up
  std::map<int32_t, Pending> pending_;
};

}  // namespace wh::sharded
