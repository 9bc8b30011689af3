// `widehead bench` as a user meets it: rows, files, limits, Ctrl-C.
#include <algorithm>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "support/command_line.h"

namespace {

using wh::Outcome;
using wh::widehead;

const std::string kSmall = "--heads 4/2 --dim 64 --queries 16 --keys 40 --causal ";

std::string text_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST(Bench, WritesATableAndAChart) {
  const std::string csv = testing::TempDir() + "widehead.csv",
                    svg = testing::TempDir() + "widehead.svg";
  const Outcome outcome = widehead("bench " + kSmall + "--against cpu_unfused --samples 1 --csv " +
                                   csv + " --svg " + svg);
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const std::string table = text_of(csv);
  EXPECT_TRUE(table.starts_with("problem,queries,keys,kernel,")) << table;
  EXPECT_EQ(std::count(table.begin(), table.end(), '\n'), 3) << table;  // header, two kernels
  EXPECT_NE(table.find("\"cpu_unfused\""), std::string::npos) << table;
  EXPECT_NE(text_of(svg).find("<svg"), std::string::npos);
  EXPECT_NE(text_of(svg).find("cpu_unfused"), std::string::npos);
}

TEST(Bench, InterruptedPrintsTheRowsThatAreDone) {
  Outcome outcome;
  nlohmann::json rows;
  // A busy machine may need longer until there is a row.
  for (int seconds = 3; seconds <= 24 && rows.empty(); seconds *= 2) {
    outcome = wh::widehead_interrupted("bench square --samples 2 --seconds 1 --json", seconds);
    ASSERT_EQ(outcome.code, 4) << outcome.err;
    EXPECT_NE(outcome.err.find("interrupted"), std::string::npos) << outcome.err;
    rows = nlohmann::json::parse(outcome.out)["rows"];
  }
  ASSERT_FALSE(rows.empty());
  for (const auto& row : rows) EXPECT_TRUE(row.contains("best_us")) << row;
}

TEST(Bench, WritesCsvThatQuotesItsCommas) {
  const std::string file = testing::TempDir() + "widehead_" + std::to_string(getpid()) + ".csv";
  const auto bench = widehead("bench " + kSmall + "--samples 1 --csv " + file);
  ASSERT_EQ(bench.code, 0) << bench.err;
  const auto text = wh::shell("sed -n 2p " + file + " | cut -c-48; rm " + file);
  EXPECT_EQ(text.out, "\"4/2 heads, dim 64, 16 x 40, f16, causal\",16,40,\n");
}

TEST(Bench, RunsRivalsOfAForcedKernel) {
  const Outcome outcome =
      widehead("bench " + kSmall + "--kernel cpu_decode --against cpu_unfused --samples 1 --json");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const auto rows = nlohmann::json::parse(outcome.out)["rows"];
  ASSERT_EQ(rows.size(), 2u);
  for (const auto& row : rows) {
    EXPECT_FALSE(row.contains("refused")) << row;
    EXPECT_GT(row["best_us"], 0) << row;
  }
}

TEST(Bench, RefusesNoSamples) {
  for (const char* flag : {"--samples 0", "--samples -1"}) {
    const Outcome outcome = widehead("bench " + kSmall + flag);
    EXPECT_EQ(outcome.code, 2) << flag;
    EXPECT_EQ(outcome.out, "") << flag;
    EXPECT_NE(outcome.err.find("--samples"), std::string::npos) << outcome.err;
  }
}

TEST(Bench, LooksAtItsLimitsBeforeItProbes) {
  // A probe of so many threads would not end, or end in a failure of the device.
  const Outcome outcome = widehead("bench " + kSmall + "--threads 1000000");
  EXPECT_EQ(outcome.code, 2) << outcome.err;
  EXPECT_EQ(outcome.out, "");
  EXPECT_NE(outcome.err.find("--threads is \"1000000\"; it must be an integer from 0 to 4096"),
            std::string::npos)
      << outcome.err;
}

TEST(Bench, ExitsWith3WithoutAKernel) {
  EXPECT_EQ(widehead("bench " + kSmall + "--workspace 10").code, 3);
}

TEST(Bench, SaysWhyNoKernelRan) {
  const Outcome outcome = widehead("bench " + kSmall + "--workspace 10");
  EXPECT_NE(outcome.err.find("wants"), std::string::npos) << outcome.err;
}

TEST(Bench, ObeysTheEnvironment) {
  setenv("WIDEHEAD_KERNEL", "bogus", 1);
  const Outcome bogus = widehead("bench " + kSmall + "--samples 1");
  setenv("WIDEHEAD_KERNEL", "cpu_unfused", 1);
  const Outcome forced = widehead("bench " + kSmall + "--samples 1 --json");
  unsetenv("WIDEHEAD_KERNEL");
  EXPECT_EQ(bogus.code, 2) << bogus.out;
  EXPECT_NE(bogus.err.find("WIDEHEAD_KERNEL is \"bogus\""), std::string::npos) << bogus.err;
  ASSERT_EQ(forced.code, 0) << forced.err;
  EXPECT_EQ(nlohmann::json::parse(forced.out)["rows"][0]["kernel"], "cpu_unfused");
}

TEST(Bench, ComparesItsAnswersWithFloat64) {
  const Outcome outcome =
      widehead("bench " + kSmall +
               "--kernel cpu_prefill --against cpu_decode,cpu_unfused --samples 1 --json");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const auto json = nlohmann::json::parse(outcome.out);
  ASSERT_EQ(json["rows"].size(), 3u);
  for (const auto& row : json["rows"]) {
    // Rounding to f16 alone costs 2^-11 / sqrt(3) at most, and never nothing.
    EXPECT_GT(row["relative_rms"], 1e-5) << row;
    EXPECT_LT(row["relative_rms"], 9e-4) << row;
    EXPECT_LE(row["peak_workspace_bytes"], row["workspace_bytes"]) << row;
    EXPECT_GT(row["peak_workspace_bytes"], 0) << row;
  }
  EXPECT_FALSE(json["blas"].get<std::string>().empty());
}

TEST(Bench, TimesTheBackwardPass) {
  const Outcome outcome = widehead(
      "bench " + kSmall + "--backward --against cpu_reference_backward --samples 1 --json");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const auto json = nlohmann::json::parse(outcome.out);
  ASSERT_EQ(json["rows"].size(), 2u);
  EXPECT_EQ(json["rows"][0]["kernel"], "cpu_backward");
  EXPECT_EQ(json["rows"][1]["role"], "reference");
  for (const auto& row : json["rows"]) {
    EXPECT_TRUE(row["problem"].get<std::string>().starts_with("backward, ")) << row;
    EXPECT_GT(row["relative_rms"], 1e-5) << row;
    EXPECT_LT(row["relative_rms"], 2.7e-3) << row;
    EXPECT_FALSE(row.contains("threshold_would_choose")) << row;
  }
  // A suite's rows, without the forward pass's kernels that it lists.
  const Outcome suite =
      widehead("bench square --backward --queries 64 --samples 1 --seconds 0.1 --json");
  ASSERT_EQ(suite.code, 0) << suite.err;
  for (const auto& row : nlohmann::json::parse(suite.out)["rows"]) {
    EXPECT_EQ(row["kernel"], "cpu_backward") << row;
  }
}

TEST(Bench, FeaturesHaveNamesOfTheirOwnAndAreMeasuredBesideThePlainKernel) {
  const Outcome outcome =
      widehead("bench features --queries 16 --keys 4096 --samples 1 --seconds 0.1 --json");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const auto json = nlohmann::json::parse(outcome.out);
  std::set<std::string> names;
  for (const auto& row : json["rows"]) {
    names.insert(row["problem"].get<std::string>());
    EXPECT_GT(row["times_plain"], 0) << row;
  }
  EXPECT_EQ(names.size(), json["rows"].size());
  EXPECT_GE(names.size(), 12u);
}

}  // namespace
