#include "parallel.h"

#include <widehead/parallel.h>

#include <algorithm>
#include <memory>

namespace widehead_python {
namespace {

// The group's methods as the C API calls them, from a thread without the GIL.
class Group {
 public:
  explicit Group(nb::handle group) : group_(group) {}

  wh_communicator c_struct(const Ranks& ranks) {
    wh_communicator c;
    wh_communicator_init(&c, sizeof(c));
    c.context = this;
    c.rank = ranks.rank;
    c.ranks = ranks.ranks;
    c.timeout_s = ranks.timeout_s;
    c.start = [](void* self, int32_t exchange, const wh_transfer* transfers, size_t count) {
      return of(self).call([&](nb::handle group) {
        nb::list all;
        for (size_t i = 0; i < count; ++i) {
          const wh_transfer& t = transfers[i];
          all.append(
              nb::make_tuple(t.peer, t.is_send != 0, reinterpret_cast<uintptr_t>(t.data), t.bytes));
        }
        group.attr("start")(exchange, all);
      });
    };
    c.finish = [](void* self, int32_t exchange, double timeout_s) {
      return of(self).call([&](nb::handle group) { group.attr("finish")(exchange, timeout_s); });
    };
    c.error = [](void* self) { return of(self).error_.c_str(); };
    return c;
  }

 private:
  static Group& of(void* self) { return *static_cast<Group*>(self); }
  template <typename Body>
  int32_t call(const Body& body) {
    const nb::gil_scoped_acquire gil;
    try {
      body(group_);
      return WH_OK;
    } catch (nb::python_error& error) {
      error_ = nb::cast<std::string>(nb::str(error.value()));
    } catch (const std::exception& error) {
      error_ = error.what();
    }
    return WH_DEVICE_ERROR;
  }

  nb::handle group_;
  std::string error_;
};

struct PlanDeleter {
  void operator()(wh_parallel_plan* plan) const { wh_parallel_plan_destroy(plan); }
};

std::vector<wh_token_range> c_ranges(
    const std::vector<std::tuple<int64_t, int64_t, int32_t>>& tokens) {
  std::vector<wh_token_range> ranges;
  for (const auto& [begin, end, rank] : tokens) ranges.push_back({begin, end, rank});
  return ranges;
}

int64_t last_of(const std::vector<wh_token_range>& ranges) {
  int64_t end = 0;
  for (const wh_token_range& range : ranges) end = std::max(end, range.end);
  return end;
}

void expect_count(const char* name, const std::optional<std::vector<int32_t>>& numbers,
                  int64_t batch) {
  if (!numbers || static_cast<int64_t>(numbers->size()) == batch) return;
  fail_value(std::string(name) + " holds " + std::to_string(numbers->size()) +
             " numbers; it must hold one for each of the batch, " + std::to_string(batch));
}

}  // namespace

nb::tuple parallel_attention(Arguments arguments, nb::handle mask, const Ranks& ranks,
                             const wh_limits& limits, nb::handle group, nb::handle allocate,
                             nb::handle empty) {
  Call call(arguments);
  call.allocate(empty);
  const auto q = c_ranges(ranks.tokens_q), k = c_ranges(ranks.tokens_k);
  if (!mask.is_none()) call.read_mask(mask, last_of(q), last_of(k));
  wh_problem whole = call.problem();
  const auto expect_own = [&](const char* name, const std::vector<wh_token_range>& ranges,
                              int64_t have) {
    int64_t own = 0;
    for (const wh_token_range& range : ranges) {
      if (range.rank == ranks.rank) own += std::max<int64_t>(0, range.end - range.begin);
    }
    if (own == have) return;
    fail_value(std::string(name) + " has " + std::to_string(have) + " tokens; rank " +
               std::to_string(ranks.rank) + " holds " + std::to_string(own));
  };
  expect_own("q", q, whole.len_q);
  expect_own("k", k, whole.len_k);
  whole.len_q = last_of(q);
  whole.len_k = last_of(k);
  expect_count("key_lengths", ranks.key_lengths, whole.batch);
  expect_count("key_starts", ranks.key_starts, whole.batch);
  if (ranks.key_lengths) whole.uses |= WH_USES_KEY_LENGTHS;
  if (ranks.key_starts) whole.uses |= WH_USES_KEY_STARTS;
  wh_shards shards;
  wh_shards_init(&shards, sizeof(shards));
  shards.ranks = ranks.ranks;
  shards.q = q.data();
  shards.q_count = q.size();
  shards.k = k.data();
  shards.k_count = k.size();
  shards.key_lengths = ranks.key_lengths ? ranks.key_lengths->data() : nullptr;
  shards.key_starts = ranks.key_starts ? ranks.key_starts->data() : nullptr;
  shards.link_gbytes_per_s = ranks.link.first;
  shards.link_latency_us = ranks.link.second;
  shards.strategy = ranks.strategy.empty() ? nullptr : ranks.strategy.c_str();
  Group callbacks(group);
  const wh_communicator communicator = callbacks.c_struct(ranks);
  std::unique_ptr<wh_parallel_plan, PlanDeleter> plan;
  wh_status status = WH_OK;
  {
    const nb::gil_scoped_release release;
    wh_parallel_plan* made = nullptr;
    status = wh_parallel_plan_create(&whole, &shards, &limits, &communicator, &made);
    plan.reset(made);
  }
  check(status);
  wh_tensors tensors = call.tensors();
  tensors.workspace_bytes = wh_parallel_plan_workspace_bytes(plan.get());
  tensors.workspace =
      reinterpret_cast<void*>(nb::cast<uintptr_t>(allocate(tensors.workspace_bytes)));
  const wh_run_options options = call.run_options();
  {
    const nb::gil_scoped_release release;
    status = wh_parallel_plan_run(plan.get(), &tensors, &options);
  }
  check(status);
  const nb::object lse = call.log_sum_exp.is_valid() ? call.log_sum_exp : nb::none();
  return nb::make_tuple(call.out, lse, wh_parallel_plan_explain(plan.get()));
}

}  // namespace widehead_python
