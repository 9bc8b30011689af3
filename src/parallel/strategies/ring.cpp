// K and V go round, one rank's at a time, beside the work on those before.
#include "parallel/strategies/builder.h"

namespace wh::sharded {

Schedule Builder::ring() {
  const bool sends = has_peer([&](int32_t peer) { return !wanted(peer, rank_).empty(); });
  const auto packed = sends ? pack_keys() : std::vector<KeyBlock>{};
  // Two of them: one is worked on while the other arrives.
  std::array<std::array<TensorAt, 2>, 2> slots{};
  int64_t most = 0;
  for_each_peer([&](int32_t peer) { most = std::max(most, count(wanted(rank_, peer))); });
  for (int32_t i = 0; i < std::min(2, s_.ranks() - 1) && most > 0; ++i) {
    slots[static_cast<size_t>(i)] = {token_major(most, p_.heads_kv, p_.dim_qk, k_.element_bytes),
                                     value_buffer(most, p_.heads_kv)};
  }
  const auto rotate = [&](int32_t distance) {
    const int32_t from = (rank_ - distance + s_.ranks()) % s_.ranks();
    const int32_t to = (rank_ + distance) % s_.ranks();
    std::vector<Message> messages;
    const auto& slot = slots[static_cast<size_t>((distance - 1) % 2)];
    for (const KeyBlock& block : blocks_in(wanted(rank_, from), slot[0], slot[1])) {
      exchange_keys(messages, from, false, block, block.k.tokens);
    }
    const Tokens sent = wanted(to, rank_);
    for (const TokenRange& range : sent) {
      exchange_keys(messages, to, true, block_with(packed, range), range);
    }
    start(distance, std::move(messages));
  };
  if (s_.ranks() > 1) rotate(1);
  begin_sum();
  for (const KeyBlock& block : local_keys()) attend_to(block);
  for (int32_t distance = 1; distance < s_.ranks(); ++distance) {
    finish(distance);
    if (distance + 1 < s_.ranks()) rotate(distance + 1);
    const int32_t from = (rank_ - distance + s_.ranks()) % s_.ranks();
    const auto& slot = slots[static_cast<size_t>((distance - 1) % 2)];
    for (const KeyBlock& block : blocks_in(wanted(rank_, from), slot[0], slot[1])) {
      attend_to(block);
    }
  }
  end_sum({});
  return finished();
}

}  // namespace wh::sharded
