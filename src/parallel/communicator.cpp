#include "parallel/communicator.h"

#include <fmt/format.h>

namespace wh::sharded {

Status late(const Communicator::Transfer& transfer, int32_t rank) {
  return {Code::kDeviceError, fmt::format("rank {} did not {} {} bytes {} rank {} in time",
                                          transfer.peer, transfer.is_send ? "take" : "send",
                                          transfer.bytes, transfer.is_send ? "from" : "to", rank)};
}

Status gave_up(int32_t rank) {
  return {Code::kDeviceError, fmt::format("rank {} failed; its own error says why", rank)};
}

Result<std::vector<uint64_t>> tell_all(Communicator& communicator, std::span<const uint64_t> mine,
                                       Communicator::Clock::time_point deadline) {
  constexpr int32_t kWords = -1;  // no number of a schedule's
  const auto ranks = static_cast<size_t>(communicator.ranks());
  std::vector<uint64_t> own(mine.begin(), mine.end()), all(ranks * own.size());
  const auto bytes = static_cast<int64_t>(mine.size_bytes());
  std::vector<Communicator::Transfer> transfers;
  for (size_t peer = 0; peer < ranks; ++peer) {
    uint64_t* theirs = all.data() + peer * own.size();
    if (static_cast<int32_t>(peer) == communicator.rank()) {
      std::copy(own.begin(), own.end(), theirs);
      continue;
    }
    transfers.push_back({static_cast<int32_t>(peer), true, own.data(), bytes});
    transfers.push_back({static_cast<int32_t>(peer), false, theirs, bytes});
  }
  WH_RETURN_IF_ERROR(communicator.start(kWords, transfers));
  WH_RETURN_IF_ERROR(communicator.finish(kWords, deadline));
  return all;
}

}  // namespace wh::sharded
