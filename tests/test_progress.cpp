// Steps: what the callback sees, that it changes no bits, and what a cancelled run leaves behind.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "core/progress.h"
#include "support/attention.h"

namespace wh {
namespace {

// Records what the callback sees and cancels from a fraction on.
struct Watcher {
  double cancel_at = 2;
  std::vector<double> fractions;
  std::chrono::steady_clock::time_point last = std::chrono::steady_clock::now();
  double longest_gap_us = 0;

  static int32_t look(void* context, double fraction) {
    auto& self = *static_cast<Watcher*>(context);
    const auto now = std::chrono::steady_clock::now();
    self.longest_gap_us = std::max(
        self.longest_gap_us, std::chrono::duration<double, std::micro>(now - self.last).count());
    self.last = now;
    self.fractions.push_back(fraction);
    return fraction >= self.cancel_at ? 1 : 0;
  }
  Progress progress() { return {look, this}; }
  wh_run_options options() {
    wh_run_options options;
    EXPECT_EQ(wh_run_options_init(&options, sizeof(options)), WH_OK);
    options.progress = look;
    options.progress_context = this;
    return options;
  }
};

// What follows a field's name in the JSON of a plan.
std::string config_of(const Attention& attention) {
  const std::string json = wh_plan_json(attention.plan.get());
  const size_t begin = json.find("\"config\":");
  EXPECT_NE(begin, std::string::npos) << json;
  return json.substr(begin, json.find('}', begin) - begin);
}
bool splits_keys(const Attention& attention) {
  const std::string config = config_of(attention);
  EXPECT_NE(config.find("\"chunk_keys\":"), std::string::npos) << config;
  return config.find("\"chunk_keys\": 0,") == std::string::npos;
}

int64_t written(const std::vector<float>& out) {
  return std::count_if(out.begin(), out.end(), [](float x) { return !std::isnan(x); });
}

// The percentage in "cancelled at 31 %; out is untouched".
int percent(const std::string& message) {
  const std::string before = "cancelled at ";
  const size_t at = message.find(before);
  return at == std::string::npos ? -1 : std::atoi(message.c_str() + at + before.size());
}

struct SteppedCase {
  const char* name;
  const char* kernel;
  int64_t heads_q, heads_kv, len_q, len_k, dim, batch;
  bool splits_keys;
  const char* state_at_30_percent;  // of out, with two threads

  Attention attention() const { return {heads_q, heads_kv, len_q, len_k, dim, batch}; }
};

// At 30 %, two threads have finished some of the 8 items or more that write out by themselves, and
// nothing of what waits for the first pair's chunks (50 %) or for the merge at the end.
const SteppedCase kCases[] = {
    {"prefill", "cpu_prefill", 4, 2, 300, 5000, 64, 1, false, "partly written"},
    {"prefill_split", "cpu_prefill", 1, 1, 100, 9000, 64, 1, true, "untouched"},
    {"decode", "cpu_decode", 4, 2, 4, 1000, 64, 16, false, "partly written"},
    {"decode_split", "cpu_decode", 4, 2, 8, 40000, 64, 1, true, "untouched"},
    {"unfused", "cpu_unfused", 4, 2, 70, 9000, 64, 1, false, "partly written"},
    {"reference", "cpu_reference", 4, 2, 70, 500, 64, 1, false, "partly written"},
};

class Stepped : public testing::TestWithParam<SteppedCase> {};

TEST_P(Stepped, LooksChangeNeitherThePlanNorTheBits) {
  Attention attention = GetParam().attention();
  attention.run(GetParam().kernel);
  const std::vector<float> out = attention.out, lse = attention.lse;
  const std::string config = config_of(attention);
  const uint64_t workspace_bytes = wh_plan_workspace_bytes(attention.plan.get());
  EXPECT_EQ(splits_keys(attention), GetParam().splits_keys);
  attention.limits.longest_step_us = 10e6;
  Watcher watcher;
  ASSERT_EQ(attention.run_with(GetParam().kernel, watcher.options()), WH_OK) << wh_last_error();
  EXPECT_EQ(config_of(attention), config);
  EXPECT_EQ(wh_plan_workspace_bytes(attention.plan.get()), workspace_bytes);
  EXPECT_TRUE(same_bits(attention.out, out) && same_bits(attention.lse, lse));
}

TEST_P(Stepped, TheFractionNeverFallsAndEndsAtOne) {
  Attention attention = GetParam().attention();
  for (const int32_t threads : {1, 3}) {
    attention.limits.threads = threads;
    Watcher watcher;
    ASSERT_EQ(attention.run_with(GetParam().kernel, watcher.options()), WH_OK) << wh_last_error();
    ASSERT_GE(watcher.fractions.size(), 10u);
    EXPECT_GT(watcher.fractions.front(), 0);
    EXPECT_LT(watcher.fractions.front(), 0.25);
    EXPECT_TRUE(std::is_sorted(watcher.fractions.begin(), watcher.fractions.end()));
    EXPECT_EQ(watcher.fractions.back(), 1);
  }
}

TEST_P(Stepped, ACancelledRunStopsSoonAndSaysWhatIsInOut) {
  Attention attention = GetParam().attention();
  attention.limits.threads = 2;
  Watcher watcher;
  watcher.cancel_at = 0.3;
  ASSERT_EQ(attention.run_with(GetParam().kernel, watcher.options()), WH_CANCELLED)
      << wh_last_error();
  const std::string message = wh_last_error();
  EXPECT_GE(watcher.fractions.back(), 0.3);
  EXPECT_EQ(std::count_if(watcher.fractions.begin(), watcher.fractions.end(),
                          [](double fraction) { return fraction >= 0.3; }),
            1);
  // All that was done by the time the call answered: two threads end the step they are in.
  EXPECT_GE(percent(message), 30) << message;
  EXPECT_LE(percent(message), 40) << message;
  EXPECT_NE(message.find(std::string("out is ") + GetParam().state_at_30_percent),
            std::string::npos)
      << message;
  EXPECT_EQ(written(attention.out) > 0,
            GetParam().state_at_30_percent == std::string("partly written"));
  EXPECT_LT(written(attention.out), static_cast<int64_t>(attention.out.size()));
}

INSTANTIATE_TEST_SUITE_P(Cpu, Stepped, testing::ValuesIn(kCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(Progress, TheMergeOfSplitKeysIsCancelledToo) {
  Attention attention(1, 1, 140, 32768, 256);
  attention.limits.threads = 1;
  Watcher watcher;
  watcher.cancel_at = 0.9997;  // the last 0.05 % of the multiply-adds are the merge's
  ASSERT_EQ(attention.run_with("cpu_prefill", watcher.options()), WH_CANCELLED) << wh_last_error();
  const std::string message = wh_last_error();
  ASSERT_TRUE(splits_keys(attention));
  EXPECT_NE(message.find("out is partly written"), std::string::npos) << message;
  EXPECT_GT(written(attention.out), 0);
  EXPECT_LT(written(attention.out), static_cast<int64_t>(attention.out.size()));
}

// The watchdog's problem: a chunk of a long prompt. One head of dim 16 keeps it under a second or
// two on two cores; a step then is a tile of some 700 rows, as with any dim. The bound of the gap
// is ten times the limit, because a machine that does other things stops us for tens of
// milliseconds; `widehead run --json` measures it.
TEST(Progress, ALongChunkIsLookedAtOften) {
  Attention attention(1, 1, 2048, 200000, 16);
  attention.limits.longest_step_us = 50e3;
  Watcher watcher;
  ASSERT_EQ(attention.run_with("cpu_prefill", watcher.options()), WH_OK) << wh_last_error();
  EXPECT_LE(watcher.longest_gap_us, 10 * attention.limits.longest_step_us);
  EXPECT_GE(watcher.fractions.size(), 100u);
  EXPECT_TRUE(std::is_sorted(watcher.fractions.begin(), watcher.fractions.end()));
  EXPECT_EQ(watcher.fractions.back(), 1);
}

TEST(Progress, StoppingWhenAllIsDoneIsNoCancelling) {
  Watcher watcher;
  watcher.cancel_at = 1;
  Progress progress = watcher.progress();
  progress.start(3);
  EXPECT_TRUE(progress.step_done(2));
  EXPECT_TRUE(progress.step_done(1));
  EXPECT_TRUE(progress.finish().ok());
  EXPECT_EQ(watcher.fractions, (std::vector<double>{2.0 / 3, 1}));
}

TEST(Progress, TheEndIsReportedThoughNoStepLooked) {
  Watcher watcher;
  Progress progress = watcher.progress();
  progress.start(1000);
  progress.add(1000);
  EXPECT_TRUE(progress.finish().ok());
  EXPECT_EQ(watcher.fractions, std::vector<double>{1});
}

}  // namespace
}  // namespace wh
