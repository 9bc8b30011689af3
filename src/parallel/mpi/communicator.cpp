#include "parallel/mpi/communicator.h"

#include <fmt/format.h>
#include <sched.h>

#include <algorithm>

namespace wh::sharded {
namespace {

constexpr int kTag = 0x7764;               // whatever else the caller sends has another
constexpr int kGivenUpTag = 0x7765;        // of what a rank sends that failed, without bytes
constexpr int64_t kMostBytes = 1ll << 30;  // of one message: MPI counts in int

}  // namespace

MpiCommunicator::MpiCommunicator(MPI_Comm comm) : comm_(comm) {
  // Errors are answers, not the end of the program.
  MPI_Comm_get_errhandler(comm_, &callers_errors_);
  MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
  MPI_Comm_rank(comm_, &rank_);
  MPI_Comm_size(comm_, &ranks_);
  int level = MPI_THREAD_SINGLE;
  MPI_Query_thread(&level);
  may_poll_ = level >= MPI_THREAD_SERIALIZED;
}

MpiCommunicator::~MpiCommunicator() {
  abandon();
  MPI_Comm_set_errhandler(comm_, callers_errors_);
  MPI_Errhandler_free(&callers_errors_);
}

// What a failure leaves behind must not write into memory that is the caller's again.
void MpiCommunicator::abandon() {
  for (auto& [exchange, pending] : pending_) {
    for (size_t i = 0; i < pending.requests.size(); ++i) {
      MPI_Request& request = pending.requests[i];
      if (request == MPI_REQUEST_NULL) continue;
      if (pending.transfers[i].is_send) {
        MPI_Request_free(&request);  // whether it can be cancelled is up to the other side
      } else {
        MPI_Cancel(&request);
        MPI_Wait(&request, MPI_STATUS_IGNORE);
      }
    }
  }
  pending_.clear();
}

Status MpiCommunicator::check(int error, const char* call) const {
  if (error == MPI_SUCCESS) return {};
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(error, text, &length);
  return {Code::kDeviceError, fmt::format("{} on rank {}: {}", call, rank_,
                                          std::string_view(text, static_cast<size_t>(length)))};
}

Status MpiCommunicator::given_up() {
  int is_there = 0;
  MPI_Status from{};
  WH_RETURN_IF_ERROR(failure_);
  WH_RETURN_IF_ERROR(
      check(MPI_Iprobe(MPI_ANY_SOURCE, kGivenUpTag, comm_, &is_there, &from), "MPI_Iprobe"));
  if (is_there == 0) return {};
  MPI_Recv(nullptr, 0, MPI_BYTE, from.MPI_SOURCE, kGivenUpTag, comm_, MPI_STATUS_IGNORE);
  failure_ = gave_up(from.MPI_SOURCE);
  abandon();
  return failure_;
}

void MpiCommunicator::give_up() {
  abandon();
  if (!failure_.ok()) return;  // the others have heard, or will
  failure_ = gave_up(rank_);
  for (int32_t peer = 0; peer < ranks_; ++peer) {
    if (peer == rank_) continue;
    MPI_Request request = MPI_REQUEST_NULL;
    if (MPI_Isend(nullptr, 0, MPI_BYTE, peer, kGivenUpTag, comm_, &request) != MPI_SUCCESS)
      continue;
    MPI_Request_free(&request);  // nothing but the other side could wait for it
  }
}

Status MpiCommunicator::start(int32_t exchange, std::span<const Transfer> transfers) {
  WH_RETURN_IF_ERROR(given_up());
  Pending& pending = pending_[exchange];
  for (const Transfer& transfer : transfers) {
    for (int64_t done = 0; done < transfer.bytes; done += kMostBytes) {
      Transfer piece = transfer;
      piece.data = static_cast<std::byte*>(transfer.data) + done;
      piece.bytes = std::min(kMostBytes, transfer.bytes - done);
      const auto bytes = static_cast<int>(piece.bytes);
      MPI_Request request = MPI_REQUEST_NULL;
      if (piece.is_send) {
        WH_RETURN_IF_ERROR(
            check(MPI_Isend(piece.data, bytes, MPI_BYTE, piece.peer, kTag, comm_, &request),
                  "MPI_Isend"));
      } else {
        WH_RETURN_IF_ERROR(
            check(MPI_Irecv(piece.data, bytes, MPI_BYTE, piece.peer, kTag, comm_, &request),
                  "MPI_Irecv"));
      }
      pending.requests.push_back(request);
      pending.transfers.push_back(piece);
    }
  }
  return {};
}

Status MpiCommunicator::finish(int32_t exchange, Clock::time_point deadline) {
  Pending& pending = pending_[exchange];
  const auto count = static_cast<int>(pending.requests.size());
  for (;;) {
    int is_done = 0;
    WH_RETURN_IF_ERROR(check(
        MPI_Testall(count, pending.requests.data(), &is_done, MPI_STATUSES_IGNORE), "MPI_Testall"));
    if (is_done != 0) break;
    WH_RETURN_IF_ERROR(given_up());
    if (Clock::now() < deadline) {
      sched_yield();  // ranks may be more than cores
      continue;
    }
    for (size_t i = 0; i < pending.requests.size(); ++i) {
      int is_one_done = 0;
      if (pending.requests[i] != MPI_REQUEST_NULL) {
        MPI_Test(&pending.requests[i], &is_one_done, MPI_STATUS_IGNORE);
      }
      if (is_one_done != 0 || pending.requests[i] == MPI_REQUEST_NULL) continue;
      const Status status = late(pending.transfers[i], rank_);
      abandon();
      return status;
    }
  }
  pending_.erase(exchange);
  return {};
}

void MpiCommunicator::poll() {
  if (!may_poll_ || pending_.empty()) return;
  int is_there = 0;
  MPI_Iprobe(MPI_ANY_SOURCE, kTag, comm_, &is_there, MPI_STATUS_IGNORE);
}

}  // namespace wh::sharded
