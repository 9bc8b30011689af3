#include "parallel/executor.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

#include "core/problem_fields.h"

namespace wh::sharded {
namespace {

// A field as 64 bits: its value where that is whole, else a hash.
struct Claim {
  std::string name;
  uint64_t bits;
  bool is_value;
};

uint64_t hash(uint64_t seed, uint64_t bits) {
  uint64_t x = (seed ^ bits) * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 31)) * 0xbf58476d1ce4e5b9u;
  return x ^ (x >> 29);
}

uint64_t hash_of(const Sharding& sharding) {
  uint64_t sum = sharding.size();
  for (const Tokens& tokens : sharding) {
    sum = hash(sum, tokens.size());
    for (const TokenRange& range : tokens) {
      sum = hash(hash(sum, static_cast<uint64_t>(range.begin)), static_cast<uint64_t>(range.end));
    }
  }
  return sum;
}

uint64_t hash_of(const std::vector<int32_t>& values) {
  uint64_t sum = values.size();
  for (const int32_t value : values) sum = hash(sum, static_cast<uint64_t>(value));
  return sum;
}

// What all ranks must say alike. Strides are each rank's own.
std::vector<Claim> claims_of(const ShardedProblem& s, Strategy strategy, const Status& own) {
  std::vector<Claim> claims{{"", static_cast<uint64_t>(own.code()), false}};
  visit_fields(
      [&]<typename Field>(const Field& field, const auto& value) {
        using Value = std::remove_cvref_t<decltype(value)>;
        if constexpr (std::is_same_v<Value, float>) {
          claims.push_back({json_name(field), std::bit_cast<uint32_t>(value), false});
        } else if constexpr (!std::is_same_v<Field, StridesOf>) {
          // Ranks may be different devices of one machine.
          const bool is_device = std::string(json_name(field)) == "device_index";
          claims.push_back({json_name(field), is_device ? 0 : static_cast<uint64_t>(value), true});
        }
      },
      s.whole);
  for (const Use& use : kUses) claims.push_back({use.name, s.whole.*use.field ? 1u : 0u, true});
  claims.push_back({"strategy", static_cast<uint64_t>(strategy), true});
  claims.push_back({"tokens of q", hash_of(s.q), false});
  claims.push_back({"tokens of k", hash_of(s.k), false});
  claims.push_back({"key_lengths", hash_of(s.key_lengths), false});
  claims.push_back({"key_starts", hash_of(s.key_starts), false});
  return claims;
}

class Runner {
 public:
  Runner(const ShardedProblem& s, const RankPlan& plan, const Tensors& tensors,
         Communicator& communicator, const ParallelRun& run)
      : s_(s), plan_(plan), t_(tensors), communicator_(communicator), run_(run) {}

  Status operator()(const Copy& copy) const {
    const TensorCopy work{at(copy.to.place), at(copy.from.place), copy.to.strides,
                          copy.from.strides, copy.extents,        copy.from.element_bytes};
    return device().copy(stream(), work, run_.options.executor);
  }

  Status operator()(const Attend& attend) const {
    const Plan& plan = *plan_.plans[static_cast<size_t>(attend.plan)];
    Tensors t;
    t.q = at(attend.q);
    t.k = at(attend.k);
    t.v = plan.problem.values_in_keys ? t.k : at(attend.v);
    t.out = at(attend.out);
    t.mask = at(attend.mask);
    t.sinks = static_cast<const float*>(at(attend.sinks));
    t.page_table = static_cast<const int32_t*>(at(attend.page_table));
    t.key_lengths = static_cast<const int32_t*>(at(attend.key_lengths));
    t.key_starts = static_cast<const int32_t*>(at(attend.key_starts));
    t.log_sum_exp = static_cast<float*>(at(attend.log_sum_exp));
    t.workspace = static_cast<std::byte*>(t_.workspace) + plan_.kernel_offset;
    t.workspace_bytes = plan_.workspace_bytes - plan_.kernel_offset;
    if (plan.workspace_bytes == 0) {
      t.workspace = nullptr;
      t.workspace_bytes = 0;
    }
    RunOptions options = run_.options;
    // A device with streams would wait for each kernel to tell how far it is.
    if (device().is_host()) {
      options.progress = [](void* context, double) -> int32_t {
        static_cast<Communicator*>(context)->poll();
        return 0;
      };
      options.progress_context = &communicator_;
    }
    return run_plan(plan, t, options);
  }

  Status operator()(const Merge& merge) const {
    std::vector<OutputPart> parts;
    for (const Part& part : merge.parts) {
      const Strides& lse = part.log_sum_exp.strides;
      parts.push_back({at(part.out.place),
                       static_cast<const float*>(at(part.log_sum_exp.place)),
                       part.dtype,
                       part.out.strides,
                       {lse[0], lse[1], lse[2]}});
    }
    const Strides& lse = merge.merged.log_sum_exp.strides;
    const OutputMerge work{merge.extents,
                           merge.merged.dtype,
                           at(merge.merged.out.place),
                           merge.merged.out.strides,
                           static_cast<float*>(at(merge.merged.log_sum_exp.place)),
                           {lse[0], lse[1], lse[2]},
                           static_cast<const float*>(at(merge.sinks)),
                           parts};
    return device().merge(work, run_.options.executor, stream());
  }

  Status operator()(const Write& write) const {
    return device().write(stream(), at(write.to), write.numbers);
  }

  Status operator()(const Start& start) const {
    std::vector<Communicator::Transfer> transfers;
    for (const Message& message : start.messages) {
      transfers.push_back({message.peer, message.is_send, at(message.place), message.bytes});
    }
    return communicator_.start(start.exchange, transfers);
  }

  Status operator()(const Finish& finish) const {
    return communicator_.finish(finish.exchange, Communicator::Clock::now() + run_.timeout);
  }

 private:
  const Backend& device() const { return backend(s_.whole.device); }
  DeviceStream stream() const { return {s_.whole.device_index, run_.options.stream}; }
  void* at(Place place) const {
    const auto moved = [&](const void* base) -> void* {
      return const_cast<std::byte*>(static_cast<const std::byte*>(base)) + place.offset_bytes;
    };
    switch (place.where) {
      case kNowhere:
        return nullptr;
      case kQ:
        return moved(t_.q);
      case kK:
        return moved(t_.k);
      case kV:
        return moved(t_.v);
      case kOut:
        return moved(t_.out);
      case kLogSumExp:
        return moved(t_.log_sum_exp);
      case kMask:
        return moved(t_.mask);
      case kSinks:
        return moved(t_.sinks);
      case kPageTable:
        return moved(t_.page_table);
      default:
        break;
    }
    return moved(static_cast<std::byte*>(t_.workspace) +
                 plan_.offsets[static_cast<size_t>(place.where)]);
  }

  const ShardedProblem& s_;
  const RankPlan& plan_;
  const Tensors& t_;
  Communicator& communicator_;
  const ParallelRun& run_;
};

// Whichever way a run ends.
struct Departure {
  explicit Departure(Communicator& from) : communicator(from) {}
  ~Departure() {
    if (!is_clean) communicator.give_up();
  }
  Departure(const Departure&) = delete;
  Departure& operator=(const Departure&) = delete;

  Communicator& communicator;
  bool is_clean = false;
};

}  // namespace

Status agree(const ShardedProblem& s, Strategy strategy, const Status& own,
             Communicator& communicator, const ParallelRun& run) {
  const std::vector<Claim> claims = claims_of(s, strategy, own);
  std::vector<uint64_t> mine;
  for (const Claim& claim : claims) mine.push_back(claim.bits);
  const auto all = tell_all(communicator, mine, Communicator::Clock::now() + run.timeout);
  if (!all.ok()) return all.status();
  if (!own.ok()) return own;
  const size_t count = claims.size();
  for (size_t rank = 0; rank * count < all->size(); ++rank) {
    const uint64_t code = (*all)[rank * count];
    if (code == 0) continue;
    return {static_cast<Code>(code),
            fmt::format("rank {} cannot take part; its own error says why", rank)};
  }
  for (size_t rank = 1; rank * count < all->size(); ++rank) {
    for (size_t i = 1; i < count; ++i) {
      const uint64_t first = (*all)[i], other = (*all)[rank * count + i];
      if (first == other) continue;
      if (!claims[i].is_value) {
        return invalid(fmt::format("{} of rank {} is not that of rank 0; all ranks must agree",
                                   claims[i].name, rank));
      }
      return invalid(fmt::format("{} is {} on rank {} and {} on rank 0; all ranks must agree",
                                 claims[i].name, static_cast<int64_t>(other), rank,
                                 static_cast<int64_t>(first)));
    }
  }
  return {};
}

Status run_rank(const ShardedProblem& s, const RankPlan& plan, const Tensors& tensors,
                Communicator& communicator, const ParallelRun& run) {
  Departure departure(communicator);
  if (plan.workspace_bytes > 0 && tensors.workspace == nullptr) {
    return invalid(fmt::format("workspace is null; the plan takes {} bytes", plan.workspace_bytes));
  }
  if (tensors.workspace_bytes < plan.workspace_bytes) {
    return invalid(fmt::format("workspace_bytes is {}; the plan takes {}", tensors.workspace_bytes,
                               plan.workspace_bytes));
  }
  const Runner runner(s, plan, tensors, communicator, run);
  for (const Step& step : plan.schedule.steps) WH_RETURN_IF_ERROR(std::visit(runner, step));
  departure.is_clean = true;
  return {};
}

}  // namespace wh::sharded
