// The command line as a user meets it: exit codes, documents, messages.
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>

namespace {

struct Outcome {
  int code = -1;
  std::string out, err;
};

Outcome widehead(const std::string& arguments) {
  const std::string errors = testing::TempDir() + "widehead_cli_errors.txt";
  const std::string command =
      std::string(WIDEHEAD_CLI) + " " + arguments + " 2>" + errors + " </dev/null";
  Outcome outcome;
  FILE* pipe = popen(command.c_str(), "r");
  std::array<char, 4096> buffer;
  while (size_t count = fread(buffer.data(), 1, buffer.size(), pipe)) {
    outcome.out.append(buffer.data(), count);
  }
  const int status = pclose(pipe);
  outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  if (FILE* file = fopen(errors.c_str(), "r")) {
    while (size_t count = fread(buffer.data(), 1, buffer.size(), file)) {
      outcome.err.append(buffer.data(), count);
    }
    fclose(file);
  }
  return outcome;
}

const std::string kSmall = "--heads 4/2 --dim 64 --queries 16 --keys 40 --causal ";

TEST(Cli, PlanPrintsOneDocumentWithEveryCandidate) {
  const Outcome outcome = widehead("plan " + kSmall + "--json");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const auto json = nlohmann::json::parse(outcome.out);
  EXPECT_EQ(json["problem"]["heads_q"], 4);
  EXPECT_EQ(json["problem"]["causal"], "bottom-right");
  int chosen = 0;
  for (const auto& candidate : json["candidates"]) chosen += candidate["verdict"] == "chosen";
  EXPECT_EQ(chosen, 1);
  EXPECT_EQ(outcome.err, "");
}

TEST(Cli, RunReadsTheRealInputAndAgreesWithItsAnswer) {
  for (const char* file : {"layer5-global", "layer0-window512"}) {
    const Outcome outcome = widehead(std::string("run ") + WIDEHEAD_EXAMPLES + "/gemma3-270m-" +
                                     file + ".safetensors --json");
    ASSERT_EQ(outcome.code, 0) << outcome.err;
    const auto json = nlohmann::json::parse(outcome.out);
    EXPECT_LT(json["relative_rms"], 9e-4);
    EXPECT_LT(json["log_sum_exp_relative_rms"], 1e-6);
    EXPECT_LE(json["peak_workspace_bytes"], json["workspace_bytes"]);
  }
}

TEST(Cli, WrongNumbersExitWith1) {
  // The window of the other layer: the stored answer cannot match.
  std::string file = testing::TempDir() + "widehead_wrong.safetensors";
  const std::string from =
      std::string(WIDEHEAD_EXAMPLES) + "/gemma3-270m-layer0-window512.safetensors";
  ASSERT_EQ(std::system(("sed 's/\"511\"/\"100\"/' " + from + " > " + file).c_str()), 0);
  const Outcome outcome = widehead("run " + file);
  EXPECT_EQ(outcome.code, 1) << outcome.err;
  EXPECT_NE(outcome.out.find("DIFFERS from"), std::string::npos);
}

TEST(Cli, RandomRunsBenchAndCheckPrintDocuments) {
  const auto run = widehead("run " + kSmall + "--seed 3 --json");
  ASSERT_EQ(run.code, 0) << run.err;
  EXPECT_GT(nlohmann::json::parse(run.out)["gflops"], 0);
  const auto bench = widehead("bench " + kSmall + "--against cpu_unfused --samples 2 --json");
  ASSERT_EQ(bench.code, 0) << bench.err;
  EXPECT_EQ(nlohmann::json::parse(bench.out)["rows"].size(), 2u);
  const auto check = widehead("check --cases corner --kernel cpu_decode --json");
  ASSERT_EQ(check.code, 0) << check.err;
  EXPECT_TRUE(nlohmann::json::parse(check.out)["wrong"].empty());
}

TEST(Cli, ListsAreDocumentsToo) {
  for (const char* what : {"kernels", "models", "suites", "devices"}) {
    const Outcome outcome = widehead(std::string("list ") + what + " --json");
    ASSERT_EQ(outcome.code, 0) << outcome.err;
    EXPECT_FALSE(nlohmann::json::parse(outcome.out).empty()) << what;
    EXPECT_EQ(widehead(std::string("list ") + what).code, 0);
  }
}

TEST(Cli, AModelIsPlannedLayerByLayer) {
  const Outcome outcome = widehead("plan --model gemma-4-31b --context 131072 --json");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const auto json = nlohmann::json::parse(outcome.out);
  ASSERT_EQ(json.size(), 2u);
  EXPECT_EQ(json[0]["problem"]["dim_qk"], 512);
  EXPECT_EQ(json[1]["problem"]["window_left"], 1023);
}

TEST(Cli, TuneStoresAProfileThatPlansUse) {
  const std::string cache = testing::TempDir() + "widehead_cache";
  const std::string environment = "XDG_CACHE_HOME=" + cache + " ";
  ASSERT_EQ(std::system(("rm -rf " + cache).c_str()), 0);
  ASSERT_EQ(setenv("XDG_CACHE_HOME", cache.c_str(), 1), 0);
  const Outcome tuned = widehead("tune --seconds 1");
  ASSERT_EQ(tuned.code, 0) << tuned.err;
  EXPECT_NE(widehead("plan " + kSmall).out.find("profile of this machine"), std::string::npos);
  EXPECT_EQ(widehead("tune --show").code, 0);
  // A foreign profile is an error where it is asked for, and ignored with a reason elsewhere.
  ASSERT_EQ(std::system(
                ("sed -i 's/\"threads\": [0-9]*/\"threads\": 999/' " + cache + "/widehead/cpu.json")
                    .c_str()),
            0);
  EXPECT_NE(widehead("plan " + kSmall).out.find("is ignored: threads: 999 then"),
            std::string::npos);
  ASSERT_EQ(std::system(("echo broken > " + cache + "/widehead/cpu.json").c_str()), 0);
  EXPECT_EQ(widehead("tune --show").code, 2);
  EXPECT_NE(widehead("plan " + kSmall).out.find("is ignored: the profile is not JSON"),
            std::string::npos);
  unsetenv("XDG_CACHE_HOME");
}

struct BadUsage {
  const char* arguments;
  int code;
  const char* message;
};

const BadUsage kBadUsages[] = {
    {"plna", 2, "did you mean plan?"},
    {"plan --headz 4", 2, "did you mean --heads?"},
    {"plan", 2, "--heads is missing"},
    {"plan --heads 4/3 --dim 64 --queries 4", 2, "multiple of heads_kv"},
    {"plan --heads x --dim 64 --queries 4", 2, "--heads is \"x\""},
    {"plan --heads 4 --dim 64/ --queries 4", 2, "--dim is \"64/\"; it must be N or N/N"},
    {"plan --heads 4 --dim 64 --queries 4 --dtype f64", 2, "valid: f32, f16, bf16"},
    {"plan --heads 4 --dim 64 --queries 4 --causal=up", 2, "valid: none, bottom-right, top-left"},
    {"plan --heads 4 --dim 64 --queries 4 --window 5", 2, "LEFT,RIGHT"},
    {"plan --heads 4 --dim 64 --queries 4 --key-lengths 9", 0, ""},
    {"plan --heads 4 --dim 64 --queries 4 --key-lengths 1,2", 2, "--key-lengths has 2 values"},
    {"plan --heads 4 --dim 64 --queries 4 --device gpu", 2, "valid: cpu, cuda"},
    {"plan --heads 4 --dim 64 --queries 4 --workspace lots", 2, "--workspace is \"lots\""},
    {"plan --heads 4 --dim 64 --queries 4 --policy best", 2, "fused-above=KEYS"},
    {"plan --heads 4 --dim 64 --queries 4 --kernel cpu_decod", 2, "did you mean \"cpu_decode\"?"},
    {"plan --heads 4 --dim 64 --queries 4 --workspace 10", 3, "allow no kernel"},
    {"run --heads 4 --dim 64 --queries 4 --workspace 10", 3, "wants"},
    {"plan --model gemma-3-4 --context 10", 2, "did you mean \"gemma-3-4b\"?"},
    {"plan --model gemma-3-4b", 2, "--context is missing"},
    {"bench cpu-prefil", 2, "did you mean \"cpu-prefill\"?"},
    {"bench --heads 4 --dim 64 --queries 4 --against cpu_unfusd", 2,
     "did you mean \"cpu_unfused\"?"},
    {"run nothing.safetensors", 2, "cannot open nothing.safetensors"},
    {"run /proc/self/status", 2, "safetensors"},
    {"check --cases many", 2, "valid: smoke, ci, full, corner"},
    {"check --kernel cpu_decod", 2, "did you mean \"cpu_decode\"?"},
    {"list models2", 2, "did you mean models?"},
};

TEST(Cli, BadUsageSaysWhatToDo) {
  for (const BadUsage& bad : kBadUsages) {
    const Outcome outcome = widehead(bad.arguments);
    EXPECT_EQ(outcome.code, bad.code) << bad.arguments << "\n" << outcome.err;
    EXPECT_NE(outcome.err.find(bad.message), std::string::npos) << bad.arguments << "\n"
                                                                << outcome.err;
  }
}

TEST(Cli, CheckCountsWhatItChecked) {
  const Outcome outcome =
      widehead("check --cases large --shrink 64 --runs 2 --kernel cpu_prefill,cpu_decode --json");
  ASSERT_EQ(outcome.code, 0) << outcome.err << outcome.out;
  const auto json = nlohmann::json::parse(outcome.out);
  EXPECT_EQ(json["cases_run"], json["case_count"]);
  ASSERT_EQ(json["kernels"].size(), 2u);
  int64_t checked = 0;
  for (const auto& kernel : json["kernels"]) {
    EXPECT_EQ(kernel["checked"].get<int64_t>() + kernel["refused"].get<int64_t>(),
              json["case_count"].get<int64_t>());
    checked += kernel["checked"].get<int64_t>();
  }
  EXPECT_EQ(json["checked"], checked);
  EXPECT_EQ(widehead("check --cases smoke --seconds 0.001 --json").code, 0);
}

TEST(Cli, CheckSaysWhichFlagIsWrong) {
  for (const char* flags : {"--shrink 0 --cases large", "--shrink 4 --cases smoke", "--runs 0",
                            "--shared-bytes -1", "--kernel cpu_prefill,cpu_decod"}) {
    const Outcome outcome = widehead(std::string("check ") + flags);
    EXPECT_EQ(outcome.code, 2) << flags;
    EXPECT_NE(outcome.err, "") << flags;
  }
}

}  // namespace
