#include "input/parallel_flags.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <charconv>

#include "api/machine.h"
#include "cuda/known_cards.h"
#include "input/number_flag.h"
#include "input/planning.h"
#include "report/session.h"

namespace wh::cli {
namespace {

enum class TokensFlag { kContiguous, kZigzag };
constexpr Names<TokensFlag, 2> kTokens{{"contiguous", "zigzag"}};

// A number in front of one of these units, or nothing.
struct Unit {
  const char* name;
  double factor;
};
template <size_t kCount>
bool read_quantity(std::string_view text, const Unit (&units)[kCount], double& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc()) return false;
  const std::string_view unit(end, static_cast<size_t>(text.data() + text.size() - end));
  for (const Unit& each : units) {
    if (unit != each.name) continue;
    value *= each.factor;
    return true;
  }
  return false;
}
constexpr Unit kRates[] = {{"GB/s", 1}, {"MB/s", 1e-3}, {"TB/s", 1e3}};
constexpr Unit kTimes[] = {{"us", 1}, {"ms", 1e3}};

}  // namespace

void add_parallel_flags(CLI::App& app, ParallelFlags& flags) {
  const auto text = [&](const char* name, std::string& value, const char* help) {
    app.add_option(name, value, help)->check(refuse_empty)->group("PARALLEL");
  };
  text("--link", flags.link, "what connects ranks, each way: 400GB/s, or 400GB/s,5us a message");
  text(
      "--tokens", flags.tokens,
      "contiguous, or zigzag: each rank a part from the front and one from the end, so that causal "
      "work is even (zigzag with --causal)");
  text("--strategy", flags.strategy, "force ring, gather, heads, queries or one_rank");
}

void add_ranks_flag(CLI::App& app, ParallelFlags& flags, const char* help) {
  add_number_flag(app, "--ranks", flags.ranks, Range<int32_t>{1, 4096}, help)->group("PARALLEL");
}

Status refuse_parallel_flags(const ParallelFlags& flags, const char* first) {
  const auto refusal = [&](const char* name) {
    return invalid(fmt::format("--{} has no effect on one device; add {}", name, first));
  };
  if (flags.ranks != 0) return refusal("ranks");
  for (const auto& [name, text] : {std::pair{"link", &flags.link},
                                   {"tokens", &flags.tokens},
                                   {"strategy", &flags.strategy},
                                   {"card", &flags.card}}) {
    if (!text->empty()) return refusal(name);
  }
  return {};
}

Result<sharded::Link> read_link(const std::string& text, double memory_gbytes_per_s) {
  sharded::Link link;
  link.memory_gbytes_per_s = memory_gbytes_per_s;
  const size_t comma = text.find(',');
  const std::string_view all(text);
  const bool is_valid =
      read_quantity(all.substr(0, comma), kRates, link.gbytes_per_s) && link.gbytes_per_s > 0 &&
      (comma == std::string::npos ||
       (read_quantity(all.substr(comma + 1), kTimes, link.latency_us) && link.latency_us >= 0));
  if (is_valid) return link;
  return invalid(fmt::format(
      "--link is \"{}\"; it must be a rate as in 400GB/s, or a rate and a time as in 400GB/s,5us",
      text));
}

Result<sharded::ShardedProblem> read_sharded(const ParallelFlags& flags, const Request& request,
                                             int32_t ranks) {
  TokensFlag tokens =
      request.problem.causal == Causal::kNone ? TokensFlag::kContiguous : TokensFlag::kZigzag;
  if (!flags.tokens.empty()) {
    const auto given = kTokens.value(flags.tokens);
    if (!given) {
      return invalid(fmt::format("--tokens is \"{}\"; valid: {}", flags.tokens, kTokens.list()));
    }
    tokens = *given;
  }
  const auto cut = tokens == TokensFlag::kZigzag ? sharded::zigzag : sharded::contiguous;
  const Problem& p = request.problem;
  if (p.query_layout != QueryLayout::kDense || p.key_layout == KeyLayout::kPacked) {
    return invalid(
        "--query-lengths, and --lengths without --pages, have no effect over several ranks, whose "
        "parts are dense or paged; --key-lengths has");
  }
  sharded::ShardedProblem made = shard(p, cut(p.len_q, ranks), cut(p.len_k, ranks));
  made.key_lengths = per_batch(request.key_lengths, p.batch);
  made.key_starts = per_batch(request.key_starts, p.batch);
  return made;
}

Result<PlannerFor> planner_for(const ParallelFlags& flags, const Problem& problem) {
  if (flags.card.empty()) {
    const auto& facts = backend(problem.device).facts(problem.device_index);
    if (!facts.unavailable.empty()) return Status(Code::kRefused, facts.unavailable);
    return PlannerFor{plan_as_library, facts.read_gbytes_per_s};
  }
  if (backend(problem.device).is_host()) {
    return invalid(fmt::format("--card is \"{}\"; it needs --device cuda", flags.card));
  }
  for (const KnownCard& card : known_cards()) {
    if (flags.card != card.name) continue;
    if (kernels_of(problem.device).empty()) {
      return Status(Code::kRefused, backend(problem.device).facts(0).unavailable);
    }
    static const CudaFacts facts = card.facts;
    return PlannerFor{[](const Problem& p, const Limits& limits) {
                        return make_plan(p, limits, {facts, kernels_of(Device::kCuda)});
                      },
                      facts.read_gbytes_per_s};
  }
  std::string valid;
  for (const KnownCard& card : known_cards()) {
    valid += fmt::format("{}{}", valid.empty() ? "" : ", ", card.name);
  }
  return invalid(fmt::format("--card is \"{}\"; valid: {}", flags.card, valid));
}

}  // namespace wh::cli
