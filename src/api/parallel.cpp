// The C API over src/parallel.
#include "widehead/parallel.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <mutex>
#include <optional>

#include "api/c_structs.h"
#include "api/guarded.h"
#include "api/machine.h"
#include "api/run.h"
#include "parallel/executor.h"
#include "parallel/link.h"

namespace wh {
namespace {

using namespace sharded;
using Clock = Communicator::Clock;

constexpr SizedStruct<wh_communicator> kCommunicatorStruct{
    "communicator", 64, {0, nullptr, 0, 0, 30, nullptr, nullptr, nullptr, nullptr, nullptr}};
constexpr SizedStruct<wh_shards> kShardsStruct{"shards", 88, {}};

// The caller's functions as the library has them.
class CallersCommunicator final : public Communicator {
 public:
  explicit CallersCommunicator(const wh_communicator& c) : c_(c) {}
  int32_t rank() const override { return c_.rank; }
  int32_t ranks() const override { return c_.ranks; }
  Status start(int32_t exchange, std::span<const Transfer> transfers) override {
    transfers_.clear();
    for (const Transfer& t : transfers) {
      if (t.bytes > 0) transfers_.push_back({t.data, t.bytes, t.peer, t.is_send ? 1 : 0});
    }
    return check(c_.start(c_.context, exchange, transfers_.data(), transfers_.size()), "start");
  }
  Status finish(int32_t exchange, Clock::time_point deadline) override {
    const std::chrono::duration<double> left = deadline - Clock::now();
    return check(c_.finish(c_.context, exchange, left.count()), "finish");
  }
  // Of a plan in the making, which has no stream yet.
  Status settle(Clock::time_point) override { return backend(device_).synchronize(on_); }
  void set_device(const Problem& p) {
    device_ = p.device;
    on_ = {p.device_index, nullptr};
  }
  void poll() override {
    if (c_.poll != nullptr) c_.poll(c_.context);
  }
  void give_up() override {
    if (c_.give_up != nullptr) c_.give_up(c_.context);
  }
  ParallelRun run() const {
    const std::chrono::duration<double> timeout(c_.timeout_s);
    return {{}, std::chrono::duration_cast<std::chrono::milliseconds>(timeout)};
  }

 private:
  Status check(int32_t code, const char* name) const {
    if (code == WH_OK) return {};
    const char* words = c_.error == nullptr ? nullptr : c_.error(c_.context);
    return {Code::kDeviceError,
            fmt::format("communicator.{}() on rank {} answered {}{}{}", name, c_.rank, code,
                        words == nullptr ? "" : ": ", words == nullptr ? "" : words)};
  }

  wh_communicator c_;
  std::vector<wh_transfer> transfers_;
  Device device_ = Device::kCpu;
  DeviceStream on_;
};

Status read_communicator(const wh_communicator* from, int32_t ranks,
                         std::optional<CallersCommunicator>& to) {
  wh_communicator c{};
  WH_RETURN_IF_ERROR(read_sized(kCommunicatorStruct, from, c));
  if (c.start == nullptr || c.finish == nullptr) {
    return invalid(fmt::format("communicator.{} is null", c.start == nullptr ? "start" : "finish"));
  }
  if (c.ranks != ranks) {
    return invalid(fmt::format("communicator.ranks is {}; shards.ranks is {}", c.ranks, ranks));
  }
  if (c.rank < 0 || c.rank >= c.ranks) {
    return invalid(
        fmt::format("communicator.rank is {}; it must be between 0 and {}", c.rank, c.ranks - 1));
  }
  if (!(c.timeout_s > 0) || c.timeout_s > 1e6) {
    return invalid(fmt::format("communicator.timeout_s is {}; it must be above 0 and at most 1e6",
                               c.timeout_s));
  }
  to.emplace(c);
  return {};
}

Status read_tokens(const char* name, const wh_token_range* ranges, size_t count, int32_t ranks,
                   Sharding& to) {
  if (ranges == nullptr && count > 0) return invalid(fmt::format("shards.{} is null", name));
  to.assign(static_cast<size_t>(ranks), {});
  for (size_t i = 0; i < count; ++i) {
    if (ranges[i].rank < 0 || ranges[i].rank >= ranks) {
      return invalid(fmt::format("shards.{}[{}].rank is {}; it must be between 0 and {}", name, i,
                                 ranges[i].rank, ranks - 1));
    }
    to[static_cast<size_t>(ranges[i].rank)].push_back({ranges[i].begin, ranges[i].end});
  }
  return {};
}

// Strides of the whole are this rank's; of the others the planner takes dense ones.
Status read_sharded(const wh_problem* whole, const wh_shards& shards, int32_t rank,
                    ShardedProblem& to) {
  Sharding q, k;
  WH_RETURN_IF_ERROR(read_tokens("q", shards.q, shards.q_count, shards.ranks, q));
  WH_RETURN_IF_ERROR(read_tokens("k", shards.k, shards.k_count, shards.ranks, k));
  wh_problem local{};
  WH_RETURN_IF_ERROR(read_sized(problem_struct(), whole, local));
  local.size = sizeof(local);
  local.len_q = count(q[static_cast<size_t>(rank)]);
  local.len_k = count(k[static_cast<size_t>(rank)]);
  Problem p;
  WH_RETURN_IF_ERROR(read_problem(&local, p));
  const LocalLayout mine{p.stride_q,   p.stride_k, p.stride_v,
                         p.stride_out, p.pages,    p.stride_page_table};
  p.len_q = whole->len_q;
  p.len_k = whole->len_k;
  // Those of one token would be anything.
  if (p.mask != MaskKind::kNone) std::copy_n(whole->stride_mask, 4, p.stride_mask.begin());
  to = shard(p, std::move(q), std::move(k));
  to.layouts[static_cast<size_t>(rank)] = mine;
  const auto read = [&](const char* name, bool is_used, const int32_t* from,
                        std::vector<int32_t>& values) -> Status {
    if (!is_used) return {};
    if (from == nullptr) return invalid(fmt::format("shards.{} is null", name));
    values.assign(from, from + p.batch);
    return {};
  };
  WH_RETURN_IF_ERROR(read("key_lengths", p.has_key_lengths, shards.key_lengths, to.key_lengths));
  WH_RETURN_IF_ERROR(read("key_starts", p.has_key_starts, shards.key_starts, to.key_starts));
  return validate(to);
}

}  // namespace
}  // namespace wh

struct wh_parallel_plan {
  wh::sharded::ShardedProblem problem;
  std::optional<wh::CallersCommunicator> communicator;  // none: it cannot run
  int32_t rank = 0;
  wh::sharded::Strategy strategy{};
  wh::sharded::RankPlan mine;
  wh::sharded::ParallelPlan all;
  mutable std::mutex mutex;
  mutable std::string explanation;
};

namespace wh {
namespace {

class PlanMaker {
 public:
  explicit PlanMaker(wh_parallel_plan& plan) : plan_(plan) {}

  Status make(const wh_problem* whole, const wh_shards* from_shards, const wh_limits* from_limits,
              const wh_communicator* from_communicator) {
    wh_shards shards{};
    WH_RETURN_IF_ERROR(read_sized(kShardsStruct, from_shards, shards));
    if (shards.ranks < 1 || shards.ranks > 4096) {
      return invalid(
          fmt::format("shards.ranks is {}; it must be between 1 and 4096", shards.ranks));
    }
    if (from_communicator != nullptr) {
      WH_RETURN_IF_ERROR(read_communicator(from_communicator, shards.ranks, plan_.communicator));
      plan_.rank = plan_.communicator->rank();
    }
    // From here on the others wait for this rank: they must hear of what is wrong.
    Limits limits;
    Status own = read_sharded(whole, shards, plan_.rank, plan_.problem);
    if (own.ok()) own = read_limits(from_limits, plan_.problem.whole, limits);
    WH_RETURN_IF_ERROR(agree_on(Strategy::kRing, own));
    if (plan_.communicator) plan_.communicator->set_device(plan_.problem.whole);
    const auto link = link_of(shards);
    if (!link.ok()) return link.status();
    const PlanOne plan_one = [](const Problem& one, const Limits& of_one) {
      return plan_here(one, of_one);
    };
    Result<ParallelPlan> all = make_parallel_plan(
        plan_.problem, {limits, shards.strategy == nullptr ? "" : shards.strategy}, *link,
        plan_one);
    own = all.status();
    if (own.ok()) own = runnable_status(*all);
    // Estimates may differ between machines; one of them decides.
    const auto chosen = of_first(own.ok() ? static_cast<uint64_t>(all->chosen) : 0);
    if (!chosen.ok()) return chosen.status();
    plan_.strategy = static_cast<Strategy>(*chosen);
    if (own.ok()) {
      Result<RankPlan> mine =
          make_rank_plan(plan_.problem, plan_.strategy, plan_.rank, limits, plan_one);
      own = mine.status();
      if (mine.ok()) plan_.mine = std::move(*mine);
    }
    WH_RETURN_IF_ERROR(agree_on(plan_.strategy, own));
    plan_.all = std::move(*all);
    return {};
  }

 private:
  Status agree_on(Strategy strategy, const Status& own) {
    if (!plan_.communicator) return own;
    return agree(plan_.problem, strategy, own, *plan_.communicator, plan_.communicator->run());
  }
  Result<uint64_t> of_first(uint64_t mine) {
    if (!plan_.communicator) return mine;
    const auto all = tell_all(*plan_.communicator, std::array{mine},
                              Clock::now() + plan_.communicator->run().timeout);
    if (!all.ok()) return all.status();
    return all->front();
  }
  // As the first rank says it, or measured.
  Result<Link> link_of(const wh_shards& shards) {
    const Problem& p = plan_.problem.whole;
    const double memory = backend(p.device).facts(p.device_index).read_gbytes_per_s;
    Link link{0, 0, memory};
    for (const auto& [mine, said] : {std::pair{shards.link_gbytes_per_s, &link.gbytes_per_s},
                                     {shards.link_latency_us, &link.latency_us}}) {
      const auto first = of_first(std::bit_cast<uint64_t>(mine));
      if (!first.ok()) return first.status();
      *said = std::bit_cast<double>(*first);
    }
    if (link.gbytes_per_s != 0 || !plan_.communicator) return link;
    return measure_link(*plan_.communicator, {p.device, p.device_index, memory},
                        plan_.communicator->run().timeout);
  }

  wh_parallel_plan& plan_;
};

Status run_as_rank(wh_parallel_plan& plan, const wh_tensors* tensors,
                   const wh_run_options* options) {
  Tensors t;
  RunOptions o;
  WH_RETURN_IF_ERROR(read_tensors(tensors, t));
  WH_RETURN_IF_ERROR(read_run_options(options, o));
  if (o.progress != nullptr) {
    return invalid("run_options.progress is set; a run over several ranks reports none");
  }
  Problem local = local_problem(plan.problem, plan.rank);
  local.has_key_lengths = local.has_key_starts = false;
  WH_RETURN_IF_ERROR(validate(local, t));
  WH_RETURN_IF_ERROR(backend(local.device).check(local, t, o.stream));
  ParallelRun run = plan.communicator->run();
  run.options = o;
  return run_rank(plan.problem, plan.mine, t, *plan.communicator, run);
}

}  // namespace
}  // namespace wh

using wh::guarded;
using wh::Status;

wh_status wh_fail(wh_status status, const char* message) {
  if (status == WH_OK) {
    return wh::fail_with_text(WH_INVALID_ARGUMENT,
                              "status of wh_fail() is WH_OK; it must be that of an error");
  }
  try {
    return wh::fail(status, message == nullptr ? "" : message);
  } catch (const std::bad_alloc&) {
    return wh::fail_with_text(status, "out of memory");
  }
}

wh_status wh_communicator_init(wh_communicator* communicator, size_t size) {
  return guarded([&] { return wh::init_sized(wh::kCommunicatorStruct, communicator, size); });
}
wh_status wh_shards_init(wh_shards* shards, size_t size) {
  return guarded([&] { return wh::init_sized(wh::kShardsStruct, shards, size); });
}

wh_status wh_parallel_plan_create(const wh_problem* whole, const wh_shards* shards,
                                  const wh_limits* limits, const wh_communicator* communicator,
                                  wh_parallel_plan** plan) {
  return guarded([&]() -> Status {
    if (plan == nullptr) return wh::invalid("plan is null; it must point to where the plan goes");
    *plan = nullptr;
    auto made = std::make_unique<wh_parallel_plan>();
    WH_RETURN_IF_ERROR(wh::PlanMaker(*made).make(whole, shards, limits, communicator));
    *plan = made.release();
    return {};
  });
}

void wh_parallel_plan_destroy(wh_parallel_plan* plan) { delete plan; }

const char* wh_parallel_plan_strategy(const wh_parallel_plan* plan) {
  return plan == nullptr ? "" : wh::sharded::kStrategies.name(plan->strategy);
}
uint64_t wh_parallel_plan_workspace_bytes(const wh_parallel_plan* plan) {
  return plan == nullptr ? 0 : plan->mine.workspace_bytes;
}
double wh_parallel_plan_estimated_us(const wh_parallel_plan* plan) {
  if (plan == nullptr) return 0;
  return plan->all.candidates[static_cast<size_t>(plan->strategy)].estimated_us;
}

const char* wh_parallel_plan_explain(const wh_parallel_plan* plan) {
  const char* text = nullptr;
  (void)guarded([&]() -> Status {
    if (plan == nullptr) return wh::invalid("plan is null");
    const std::lock_guard lock(plan->mutex);
    if (plan->explanation.empty()) plan->explanation = explain(plan->all);
    text = plan->explanation.c_str();
    return {};
  });
  return text;
}

wh_status wh_parallel_plan_run(wh_parallel_plan* plan, const wh_tensors* tensors,
                               const wh_run_options* options) {
  return guarded([&]() -> Status {
    if (plan == nullptr) return wh::invalid("plan is null");
    if (!plan->communicator) {
      return wh::invalid("plan has no communicator; it says what would be done and cannot run");
    }
    const Status status = wh::run_as_rank(*plan, tensors, options);
    if (!status.ok()) plan->communicator->give_up();  // the others are running
    return status;
  });
}
