// The command line as a user meets it: exit codes, documents, messages.
#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>

#include "input/safetensors.h"
#include "report/session.h"
#include "support/command_line.h"

namespace {

using wh::Outcome;
using wh::widehead;

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

// As NCCL logs, whatever its variables say.
TEST(Cli, StdoutIsKeptForAnswers) {
  testing::internal::CaptureStdout();
  testing::internal::CaptureStderr();
  {
    const wh::cli::KeptStdout kept, again;
    std::printf("of a library\n");
    std::fprintf(wh::cli::answers(), "an answer\n");
  }
  std::fprintf(wh::cli::answers(), "another\n");
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "an answer\nanother\n");
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "of a library\n");
}

std::string example(const char* layer) {
  return std::string(WIDEHEAD_EXAMPLES) + "/gemma3-270m-" + layer + ".safetensors ";
}

TEST(Cli, OptionsOfAFileGiveWayToFlags) {
  const std::string file = example("layer0-window512");
  // As its metadata has them.
  EXPECT_EQ(widehead("run " + file + "--causal --window 511,-1 --scale 0.0625").code, 0);
  // Otherwise the stored answer is that of another problem: wrong numbers exit with 1.
  for (const char* flag : {"--window 100,-1", "--scale 1", "--softcap 2", "--causal=none"}) {
    const Outcome outcome = widehead("run " + file + flag);
    EXPECT_EQ(outcome.code, 1) << flag << "\n" << outcome.err;
    EXPECT_NE(outcome.out.find("DIFFERS from the stored answer"), std::string::npos) << flag;
  }
  const Outcome without = widehead("run " + file + "--log-sum-exp=false --json");
  ASSERT_EQ(without.code, 0) << without.err;
  EXPECT_FALSE(nlohmann::json::parse(without.out).contains("log_sum_exp_relative_rms"));
  // On the device that was asked for, or not at all.
  const Outcome cuda = widehead("run " + file + "--device cuda --json");
  if (cuda.code == 0) {
    const std::string kernel = nlohmann::json::parse(cuda.out)["kernel"];
    EXPECT_FALSE(kernel.starts_with("cpu_")) << kernel;
  } else {
    EXPECT_EQ(cuda.code, 3);
    EXPECT_NE(cuda.err.find("cuda"), std::string::npos) << cuda.err;
  }
}

TEST(Cli, TheShapeOfAFileIsItsOwn) {
  for (const char* flag :
       {"--batch=1", "--heads=4/1", "--dim=256", "--queries=256", "--keys=2048", "--dtype=f16",
        "--kv-dtype=f16", "--mask=boolean", "--sinks", "--key-lengths=9", "--key-starts=0",
        "--lengths=9", "--query-lengths=9", "--pages=16", "--layout=heads-first",
        "--model=gemma-3-4b", "--context=9", "--backward", "--seed=1"}) {
    const Outcome outcome = widehead("run " + example("layer5-global") + flag);
    EXPECT_EQ(outcome.code, 2) << flag;
    const std::string name(flag, std::strcspn(flag, "="));
    EXPECT_NE(outcome.err.find(name + " has no effect with a file"), std::string::npos)
        << outcome.err;
  }
}

TEST(Cli, NumbersSayWhatTheyMayBe) {
  struct Wrong {
    std::string command, words;
  };
  const Wrong all[] = {
      {"run " + kSmall + "--seed -1",
       "--seed is \"-1\"; it must be an integer from 0 to 18446744073709551615"},
      {"run " + kSmall + "--seed 99999999999999999999", "--seed is \"99999999999999999999\""},
      {"check --seed -1", "--seed is \"-1\"; it must be an integer from 0 to"},
      {"check --runs 0", "--runs is \"0\"; it must be an integer from 1 to"},
      {"check --shrink -3", "--shrink is \"-3\"; it must be an integer from 1 to"},
      {"check --shared-bytes -1", "--shared-bytes is \"-1\"; it must be an integer from 0 to"},
      {"check --seconds nan", "--seconds is \"nan\"; it must be a number from 0 to 1000000000"},
      {"bench " + kSmall + "--samples 1.5",
       "--samples is \"1.5\"; it must be an integer from 1 to"},
      {"bench " + kSmall + "--seconds -1", "--seconds is \"-1\"; it must be a number from 0 to"},
      {"bench " + kSmall + "--skip-over nan", "--skip-over is \"nan\"; it must be a number from 0"},
      {"tune --seconds nan", "--seconds is \"nan\"; it must be a number from 0 to"},
      {"plan " + kSmall + "--threads 99999999999",
       "--threads is \"99999999999\"; it must be an integer from 0 to 4096"},
      {"plan " + kSmall + "--step-ms nan", "--step-ms is \"nan\"; it must be a number from 0 to"},
      {"plan " + kSmall + "--fresh-keys -2",
       "--fresh-keys is \"-2\"; it must be an integer from -1 to"},
      {"plan " + kSmall + "--ranks 0", "--ranks is \"0\"; it must be an integer from 1 to 4096"},
      {"plan " + kSmall + "--softcap 1e-50",
       "--softcap is \"1e-50\"; it must be a number that an f32"},
      {"plan " + kSmall + "--scale 1e400", "scale is inf; it must be finite"},
      {"plan " + kSmall + "--scale 1e300", "--scale is \"1e300\"; it must be a number that an f32"},
      {"plan --model gemma-3-270m --context x",
       "--context is \"x\"; it must be an integer from 0 to 2147483647"},
      {"plan --model gemma-3-270m --context -5",
       "--context is \"-5\"; it must be an integer from"}};
  for (const Wrong& wrong : all) {
    const Outcome outcome = widehead(wrong.command);
    EXPECT_EQ(outcome.code, 2) << wrong.command;
    EXPECT_NE(outcome.err.find(wrong.words), std::string::npos) << outcome.err;
  }
}

TEST(Cli, WhatIsMissingOrHasNoEffectSaysWhatIsValid) {
  const std::pair<std::string, std::string> all[] = {
      {"", "a verb is missing; valid: plan, run, check, bench, tune, list"},
      {"list", "what to list is missing; valid: kernels, models, suites, devices"},
      {"plan " + kSmall + "--card h100", "--card has no effect on one device; add --ranks"},
      {"plan " + kSmall + "--parallel nccl",
       "not expected: --parallel nccl; plan starts no ranks, --ranks says how many there would be"},
      {"plan " + kSmall + "--samples 3", "not expected: --samples 3; --samples is of bench"},
      {"plan " + kSmall + "--casual", "not expected: --casual; did you mean --causal?"}};
  for (const auto& [command, words] : all) {
    const Outcome outcome = widehead(command);
    EXPECT_EQ(outcome.code, 2) << command;
    EXPECT_NE(outcome.err.find(words), std::string::npos) << outcome.err;
  }
}

TEST(Cli, RandomRunsBenchAndCheckPrintDocuments) {
  const auto run = widehead("run " + kSmall + "--seed 3 --json");
  ASSERT_EQ(run.code, 0) << run.err;
  const auto document = nlohmann::json::parse(run.out);
  EXPECT_GT(document["gflops"], 0);
  EXPECT_LE(document["peak_workspace_bytes"], document["workspace_bytes"]);
  EXPECT_EQ(document["compared_rows"], 4 * 16);
  EXPECT_GT(document["relative_rms"], 0);
  EXPECT_LT(document["relative_rms"], 9e-4);
  const auto bench = widehead("bench " + kSmall + "--against cpu_unfused --samples 2 --json");
  ASSERT_EQ(bench.code, 0) << bench.err;
  EXPECT_EQ(nlohmann::json::parse(bench.out)["rows"].size(), 2u);
  const auto check = widehead("check --cases corner --kernel cpu_decode --json");
  ASSERT_EQ(check.code, 0) << check.err;
  EXPECT_TRUE(nlohmann::json::parse(check.out)["wrong"].empty());
}

// In a process of its own, as every command line is. Beside tensors and plan there are the pages
// that each of those begins and ends in, code that runs for the first time and stacks of threads
// (120 KiB seen), and for cpu_unfused the CBLAS's buffers (1 MiB seen with two threads).
TEST(Cli, ARunTakesItsTensorsAndItsPlanInMemory) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "AddressSanitizer's own memory would be counted";
#endif
  struct Case {
    const char* problem;
    const char* kernel;
    int64_t bound_kib;
  };
  const Case cases[] = {
      {"--heads 8/2 --dim 64 --queries 256 --keys 4096", "cpu_prefill", 256},
      {"--heads 1 --dim 256 --queries 100 --keys 16384", "cpu_prefill", 256},  // splits the keys
      {"--heads 8/2 --dim 64 --queries 4 --keys 20000", "cpu_decode", 256},
      {"--heads 8/2 --dim 64 --queries 256 --keys 2048", "cpu_unfused", 8192},
      {"--heads 8/2 --dim 64 --queries 4 --keys 2048", "cpu_reference", 256},
      {"--heads 8/2 --dim 64 --queries 512 --keys 2048 --backward", "cpu_backward", 256},
  };
  for (const Case& one : cases) {
    const auto run = widehead(std::string("run ") + one.problem + " --kernel " + one.kernel +
                              " --threads 2 --json");
    ASSERT_EQ(run.code, 0) << run.err;
    const auto json = nlohmann::json::parse(run.out);
    const auto planned =
        json["tensor_bytes"].get<int64_t>() + json["workspace_bytes"].get<int64_t>();
    ASSERT_GT(planned, 1 << 20);
    const int64_t difference = json["peak_resident_bytes"].get<int64_t>() - planned;
    EXPECT_LE(difference, one.bound_kib << 10) << run.out;
    EXPECT_GE(difference, -(128 << 10)) << run.out;
    EXPECT_GT(json["longest_step_us"], 0);
  }
}

TEST(Cli, RandomRunsAreComparedWithFloat64InEveryMode) {
  for (const char* flags :
       {"--dtype f32", "--dtype bf16 --sinks", "--dtype f32 --kv-dtype f16 --softcap 3",
        "--mask boolean --layout length-first", "--dtype bf16 --mask additive",
        "--batch 3 --key-lengths 5,0,40 --key-starts 2", "--causal=top-left --window 4,0"}) {
    const Outcome outcome =
        widehead("run --heads 4/2 --dim 24/40 --queries 33 --keys 40 --json " + std::string(flags));
    ASSERT_EQ(outcome.code, 0) << flags << "\n" << outcome.err;
    EXPECT_LT(nlohmann::json::parse(outcome.out)["relative_rms"], 7e-3) << flags;
    EXPECT_EQ(nlohmann::json::parse(outcome.out)["compared_rows"], 64) << flags;
  }
}

TEST(Cli, RandomRunsOfSequencesAreComparedWithFloat64) {
  struct Case {
    const char* flags;
    int64_t rows, pairs, keys;  // of all sequences; pairs that they see
  };
  const Case cases[] = {
      {"--queries 3 --lengths 5,70,0", 3 * 3 * 4, 3 * 75, 75},
      {"--queries 3 --lengths 5,70,0 --pages 16", 3 * 3 * 4, 3 * 75, 75},
      {"--queries 3 --lengths 5,70,0 --pages 16 --layout heads-first", 36, 3 * 75, 75},
      {"--query-lengths 1,7,0 --lengths 5,9,3 --pages 2 --causal", 8 * 4, 5 + (3 + 9) * 7 / 2, 17},
      {"--query-lengths 1,7 --lengths 5,9 --dtype bf16 --log-sum-exp", 8 * 4, 5 + 63, 14},
      {"--query-lengths 1,7 --keys 9", 8 * 4, 8 * 9, 18},
      {"--batch 2 --queries 1 --keys 33 --pages 16", 2 * 4, 66, 66}};
  for (const Case& one : cases) {
    const Outcome outcome =
        widehead("run --heads 4/2 --dim 24/40 --json " + std::string(one.flags));
    ASSERT_EQ(outcome.code, 0) << one.flags << "\n" << outcome.err;
    const auto json = nlohmann::json::parse(outcome.out);
    EXPECT_GT(json["relative_rms"], 0) << one.flags;
    EXPECT_EQ(json["compared_rows"], one.rows) << one.flags;
    const double best_us = json["best_us"];
    EXPECT_NEAR(json["gflops"].get<double>() * best_us * 1e3, one.pairs * 4 * 2 * (24 + 40), 1);
    EXPECT_NEAR(json["kv_gbytes_per_s"].get<double>() * best_us * 1e3, one.keys * 2 * (24 + 40) * 2,
                1);
  }
  const Outcome plan = widehead("plan --heads 4/2 --dim 64 --queries 1 --lengths 5,700 --pages 64");
  ASSERT_EQ(plan.code, 0) << plan.err;
  EXPECT_NE(plan.out.find("12 pages of 64"), std::string::npos) << plan.out;
}

TEST(Cli, GradientsOfRandomRunsAreComparedWithFloat64) {
  for (const char* flags :
       {"--dtype f32", "--dtype bf16 --sinks", "--dtype f32 --kv-dtype f16 --softcap 3",
        "--mask boolean --layout length-first", "--scale 4 --dtype f32",
        "--batch 3 --key-lengths 5,0,40 --key-starts 2", "--causal=top-left --window 4,0",
        "--dtype bf16 --kernel cpu_reference_backward"}) {
    const Outcome outcome =
        widehead("run --heads 4/2 --dim 40/24 --queries 33 --keys 40 --backward --json " +
                 std::string(flags));
    ASSERT_EQ(outcome.code, 0) << flags << "\n" << outcome.err;
    const auto json = nlohmann::json::parse(outcome.out);
    EXPECT_EQ(json["kernel"].get<std::string>().find("_backward") == std::string::npos, false);
    EXPECT_GT(json["relative_rms"], 0) << flags;
    EXPECT_LT(json["relative_rms"], 2.1e-2) << flags;
    EXPECT_EQ(json["compared_rows"], 64) << flags;
    EXPECT_EQ(json["compared_keys"], 64) << flags;
    EXPECT_LE(json["peak_workspace_bytes"], json["workspace_bytes"]);
  }
  const Outcome text = widehead("run " + kSmall + "--backward");
  ASSERT_EQ(text.code, 0) << text.err;
  EXPECT_NE(text.out.find("gradient   agrees with float64 on 64 of 64 rows and 64 of 80 keys"),
            std::string::npos)
      << text.out;
}

TEST(Cli, GradientsOfPackedSequencesAreComparedWithFloat64) {
  const Outcome outcome = widehead(
      "run --heads 4/2 --dim 40/24 --query-lengths 5,0,60,1 --lengths 9,7,60,0 --causal --sinks "
      "--backward --json");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const auto json = nlohmann::json::parse(outcome.out);
  EXPECT_EQ(json["kernel"], "cpu_backward");
  EXPECT_GT(json["relative_rms"], 0);
  EXPECT_LT(json["relative_rms"], 3e-3);
  EXPECT_EQ(json["compared_rows"], 64);
  EXPECT_EQ(json["compared_keys"], 64);
}

TEST(Cli, RatesCountTheKeysThatAreThere) {
  const Outcome outcome = widehead(
      "run --batch 2 --heads 2 --dim 8 --queries 4 --keys 1000 --key-lengths 10,6 "
      "--key-starts 2 --json");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const auto json = nlohmann::json::parse(outcome.out);
  const double best_us = json["best_us"];
  EXPECT_NEAR(json["gflops"].get<double>() * best_us * 1e3, 4 * (8 + 4) * 2 * 2 * 16, 1);
  EXPECT_NEAR(json["kv_gbytes_per_s"].get<double>() * best_us * 1e3, (8 + 4) * 2 * 16 * 2, 1);
  const Outcome backward = widehead(
      "run --batch 2 --heads 2 --dim 8/4 --queries 4 --keys 1000 --key-lengths 10,6 "
      "--key-starts 2 --backward --json");
  ASSERT_EQ(backward.code, 0) << backward.err;
  const auto gradients = nlohmann::json::parse(backward.out);
  EXPECT_NEAR(gradients["gflops"].get<double>() * gradients["best_us"].get<double>() * 1e3,
              4 * (8 + 4) * 2 * 2 * (3 * 8 + 2 * 4), 1);
}

TEST(Cli, RunWritesItsAnswer) {
  const std::string path = testing::TempDir() + "widehead_out.safetensors";
  ASSERT_EQ(widehead("run " + example("layer5-global") + "--out " + path).code, 0);
  const auto file = wh::cli::MappedFile::open(path);
  ASSERT_TRUE(file.ok());
  const auto view = wh::cli::parse_safetensors(file->bytes());
  ASSERT_TRUE(view.ok()) << view.status().message();
  EXPECT_EQ(view->tensors.at("out").shape, (std::vector<int64_t>{1, 4, 256, 256}));
  EXPECT_EQ(view->tensors.at("log_sum_exp").shape, (std::vector<int64_t>{1, 4, 256}));
  const Outcome nowhere = widehead("run " + kSmall + "--out /nowhere/x");
  EXPECT_EQ(nowhere.code, 2);
  EXPECT_NE(nowhere.err.find("cannot write /nowhere/x"), std::string::npos) << nowhere.err;
}

TEST(Cli, TheEnvironmentWinsAndIsNamed) {
  const auto with = [](const char* variable, const char* value, const std::string& arguments) {
    setenv(variable, value, 1);
    const Outcome outcome = widehead(arguments);
    unsetenv(variable);
    return outcome;
  };
  for (const char* verb : {"plan ", "run "}) {
    const Outcome bogus = with("WIDEHEAD_KERNEL", "bogus", verb + kSmall);
    EXPECT_EQ(bogus.code, 2) << verb;
    EXPECT_NE(bogus.err.find("WIDEHEAD_KERNEL is \"bogus\""), std::string::npos) << bogus.err;
    const Outcome forced =
        with("WIDEHEAD_KERNEL", "cpu_unfused", verb + kSmall + "--kernel cpu_reference --json");
    ASSERT_EQ(forced.code, 0) << forced.err;
    const auto json = nlohmann::json::parse(forced.out);
    EXPECT_EQ(json["kernel"], "cpu_unfused") << verb;
    EXPECT_EQ(json["environment"]["WIDEHEAD_KERNEL"], "cpu_unfused") << verb;
    EXPECT_NE(with("WIDEHEAD_FUSED_ABOVE", "0", verb + kSmall + "--kernel cpu_unfused")
                  .out.find("variables  WIDEHEAD_FUSED_ABOVE=0: the environment wins"),
              std::string::npos);
    EXPECT_EQ(with("WIDEHEAD_WORKSPACE_LIMIT", "10", verb + kSmall).code, 3) << verb;
    const Outcome logged = with("WIDEHEAD_LOG", "plan", verb + kSmall);
    EXPECT_NE(logged.err.find("widehead: 4/2 heads, dim 64, 16 x 40, f16, causal: cpu_"),
              std::string::npos)
        << logged.err;
  }
  EXPECT_EQ(widehead("plan " + kSmall).out.find("variables"), std::string::npos);
}

TEST(Cli, AFailingDeviceExitsWith4) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "AddressSanitizer ends the program instead";
#endif
  const Outcome outcome =
      widehead("run --heads 1024 --dim 1024 --queries 1 --keys 2147483647 --dtype f32");
  EXPECT_EQ(outcome.code, 4) << outcome.err;
  EXPECT_NE(outcome.err.find("not enough memory"), std::string::npos) << outcome.err;
  // The same where the limits refuse it: before there is any tensor.
  EXPECT_EQ(
      widehead("run --heads 1024 --dim 1024 --queries 1 --keys 2147483647 --workspace 1").code, 3);
  EXPECT_EQ(widehead("plan --batch 2147483647 --heads 1 --dim 1 --queries 1 --keys 9 "
                     "--key-lengths 5")
                .code,
            0);
}

TEST(Cli, RunInterruptedSaysWhatOutHolds) {
  Outcome outcome;
  // Before the run begins, Ctrl-C just ends the program.
  for (int seconds = 3; seconds <= 24 && outcome.code != 4; seconds *= 2) {
    outcome = wh::widehead_interrupted(
        "run --heads 8/2 --dim 256 --queries 16384 --keys 65536 --json", seconds);
  }
  EXPECT_EQ(outcome.code, 4) << outcome.err;
  EXPECT_NE(outcome.err.find("cancelled"), std::string::npos) << outcome.err;
  EXPECT_NE(outcome.err.find("out is"), std::string::npos) << outcome.err;
  EXPECT_EQ(outcome.out, "");
}

TEST(Cli, ALayerThatFailsIsARowAmongOthers) {
  // Gemma's global layers need more than its local ones, which look at 1024 keys.
  const Outcome outcome = widehead(
      "run --model gemma-4-31b --context 4096 --kernel cpu_unfused --workspace 10MiB --json");
  EXPECT_EQ(outcome.code, 3) << outcome.err;
  const auto json = nlohmann::json::parse(outcome.out);
  ASSERT_EQ(json.size(), 2u);
  int failed = 0;
  for (const auto& row : json) failed += row.contains("error");
  EXPECT_EQ(failed, 1) << json;
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

// By hand: caches of f16 keys and values, a sliding layer's as long as what it sees.
TEST(Cli, AModelsPlanEndsWithWhatAllItsLayersTake) {
  const auto total = [](const std::string& arguments) {
    const Outcome outcome = widehead("plan --json --model " + arguments);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    return nlohmann::json::parse(outcome.out);
  };
  const double gemma = 2 * (10. * 131072 * 4 * (512 + 512) + 50. * 1024 * 16 * (256 + 256));
  EXPECT_EQ(total("gemma-4-31b --context 131072")[0]["model"]["cache_bytes"], gemma);
  const auto chunk = total("gemma-4-31b --context 131072 --queries 100")[0]["model"];
  EXPECT_EQ(chunk["cache_bytes"], gemma + 2 * 50. * 99 * 16 * (256 + 256));
  // Layers that read another's cache run all the same.
  const auto shared = total("gemma-4-e2b --context 4096");
  EXPECT_EQ(shared[0]["model"]["cache_bytes"],
            2 * (3. * 4096 * 1 * (512 + 512) + 12. * 512 * 1 * (256 + 256)));
  EXPECT_DOUBLE_EQ(
      shared[0]["model"]["estimated_us"].get<double>(),
      7 * shared[0]["estimated_us"].get<double>() + 28 * shared[1]["estimated_us"].get<double>());
  EXPECT_EQ(shared[0]["model"]["workspace_bytes"],
            std::max(shared[0]["workspace_bytes"], shared[1]["workspace_bytes"]));
  // Latent layers cache what the absorbed form reads, whichever form runs.
  for (const auto& [queries, form] : {std::pair{1, 1}, {2048, 0}}) {
    const auto latent = total("deepseek-v3 --context 8192 --queries " + std::to_string(queries));
    EXPECT_EQ(latent[0]["model"]["cache_bytes"], 2 * 61. * 8192 * 576);
    EXPECT_DOUBLE_EQ(latent[0]["model"]["estimated_us"].get<double>(),
                     61 * latent[form]["estimated_us"].get<double>());
    EXPECT_EQ(latent[0]["model"]["expanded_bytes"],
              form == 0 ? 2 * 8192. * 128 * (192 + 128) : 0.0);
  }
}

TEST(Cli, TheLargestContextThatFitsIsTheLargest) {
  const std::string model = "plan --model qwen3.5-122b-a10b --json --memory ";
  const auto planned = nlohmann::json::parse(widehead(model + "24GiB").out)[0]["model"];
  const int64_t keys = planned["largest_context"];
  EXPECT_EQ(planned["keys"], keys);
  EXPECT_LE(planned["memory_bytes"], 24. * (1 << 30));
  const auto one_more =
      nlohmann::json::parse(widehead(model + "24GiB --context " + std::to_string(keys + 1)).out);
  EXPECT_GT(one_more[0]["model"]["memory_bytes"], 24. * (1 << 30));
  EXPECT_EQ(one_more[0]["model"]["largest_context"], keys);
  // Text has it last.
  const std::string text = widehead("plan --model qwen3.5-122b-a10b --memory 24GiB").out;
  EXPECT_NE(text.find("of 24.0 GiB, which " + std::to_string(keys) + " keys fit\n"),
            std::string::npos)
      << text;
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
    {"plan --heads 4 --dim 64 --queries 4 --window ,5", 2,
     "--window is \"\"; it must be an integer"},
    {"plan --heads 4 --dim 64 --queries 4 --window 5,", 2,
     "--window is \"\"; it must be an integer"},
    {"plan --heads 4 --dim 64 --queries 4 --window 5,3 --causal", 2, "RIGHT must be 0 or -1"},
    {"plan --heads 4 --dim 64 --queries 4 --key-lengths 9", 2,
     "--key-lengths is \"9\"; it must be an integer from 0 to 4"},
    {"plan --heads 4 --dim 64 --queries 4 --key-lengths 4294967297", 2, "from 0 to 4"},
    {"plan --heads 4 --dim 64 --queries 4 --key-lengths 4,", 2, "--key-lengths is \"\""},
    {"plan --heads 4 --dim 64 --queries 4 --key-starts -1", 2, "from 0 to 2147483647"},
    {"plan --heads 4 --dim 9000000000000000000 --queries 4", 2, "dim_qk is 9000000000000000000"},
    {"plan --heads 2147483647 --dim 1024 --queries 2147483647", 2, "64-bit byte offset"},
    {"plan --heads 4 --dim 64 --queries 4 --batch 99999999999999999999", 2, "--batch is"},
    {"plan --heads 4 --dim 64 --queries 4 --softcap ''", 2, "--softcap: it is empty"},
    {"plan --heads 4 --dim 64 --queries 4 --kernel ''", 2, "--kernel: it is empty"},
    {"plan --heads 4 --dim 64 --queries 4 --device cuda:4294967296", 2, "cuda:0 to cuda:1023"},
    {"plan --heads 4 --dim 64 --queries 4 --device cuda:", 2, "--device is \"cuda:\""},
    {"plan --heads 4 --dim 64 --queries 4 --device cuda --threads 2", 2, "--threads has no effect"},
    {"plan --heads 4 --dim 64 --queries 4 --fresh-keys 2", 2, "--fresh-keys has no effect"},
    {"plan --heads 4 --dim 64 --queries 4 --context 9", 2, "--context has no effect"},
    {"plan --model gemma-3-4b --context 9 --keys 9", 2, "--keys has no effect"},
    {"plan --heads 4 --dim 64 --queries 4 --policy fused --kernel cpu_decode", 2,
     "--policy has no effect"},
    {"bench cpu-decode --model gemma-3-4b", 2, "--model has no effect"},
    {"run --model gemma-3-4b --context 9 --out x", 2, "--out has room for one answer"},
    {"plan --heads 4 --dim 64 --queries 4 --key-lengths 1,2", 2, "--key-lengths has 2 values"},
    {"plan --heads 4 --dim 64 --queries 4 --lengths 9,-1", 2,
     "--lengths is \"-1\"; it must be an integer from 0 to 2147483647"},
    {"plan --heads 4 --dim 64 --queries 4 --lengths 2147483647,1", 2,
     "--lengths adds up to 2147483648; it must be at most 2147483647"},
    {"plan --heads 4 --dim 64 --queries 4 --lengths 9 --keys 9", 2,
     "--keys has no effect with --lengths"},
    {"plan --heads 4 --dim 64 --queries 4 --query-lengths 4", 2,
     "--queries has no effect with --query-lengths"},
    {"plan --heads 4 --dim 64 --queries 4 --lengths 9 --batch 1", 2,
     "--batch has no effect with --lengths, which has 1 sequences"},
    {"plan --heads 4 --dim 64 --query-lengths 1,2 --lengths 9", 2,
     "--lengths has 1 sequences; --query-lengths has 2"},
    {"plan --heads 4 --dim 64 --queries 4 --pages 0", 2, "--pages is \"0\"; it must be an integer"},
    {"plan --heads 4 --dim 64 --queries 4 --pages 16 --key-lengths 3", 2,
     "--key-lengths has no effect with --pages"},
    {"plan --heads 4 --dim 64 --query-lengths 4 --pages 16", 2, "--lengths is missing"},
    {"plan --heads 4 --dim 64 --query-lengths 4,4 --keys 9 --mask boolean", 2,
     "mask is boolean; it must be none where queries are packed"},
    {"plan --heads 4 --dim 64 --queries 4 --lengths 9 --pages 4 --backward", 2,
     "pass is backward with paged keys; they must be dense or packed"},
    {"plan --heads 4 --dim 64 --queries 4 --lengths 16,9 --ranks 2 --link 1GB/s", 2,
     "no effect over several ranks"},
    {"plan --model gemma-3-4b --context 9 --lengths 9", 2, "--lengths has no effect"},
    {"plan --heads 4 --dim 64 --queries 4 --device gpu", 2, "valid: cpu, cuda"},
    {"plan --heads 4 --dim 64 --queries 4 --workspace lots", 2, "--workspace is \"lots\""},
    {"plan --heads 4 --dim 64 --queries 4 --policy best", 2, "fused-above=KEYS"},
    {"plan --heads 4 --dim 64 --queries 4 --kernel cpu_decod", 2, "did you mean \"cpu_decode\"?"},
    {"plan --heads 4 --dim 64 --queries 4 --workspace 10", 3, "allow no kernel"},
    {"run --heads 4 --dim 64 --queries 4 --workspace 10", 3, "wants"},
    {"plan --model gemma-3-4 --context 10", 2, "did you mean \"gemma-3-4b\"?"},
    {"plan --model gemma-3-4b", 2, "--context is missing"},
    {"plan --model gemma-3-4b --memory lots", 2, "--memory is \"lots\"; it must be bytes"},
    {"plan --model gemma-3-4b --memory 1KiB", 2, "--memory is 1KiB; not even one key"},
    {"plan --model gemma-3-4b --memory 1GiB --backward", 2, "no effect with --backward"},
    {"plan --heads 4 --dim 64 --queries 4 --memory 1GiB", 2, "no effect without --model"},
    {"bench cpu-prefil", 2, "did you mean \"cpu-prefill\"?"},
    {"bench --heads 4 --dim 64 --queries 4 --against cpu_unfusd", 2,
     "did you mean \"cpu_unfused\"?"},
    {"plan --heads 4 --dim 64 --queries 4 --backward --log-sum-exp", 2,
     "--log-sum-exp has no effect with --backward"},
    {"run --heads 4 --dim 64 --queries 4 --backward --out x", 2,
     "--out has no effect with --backward"},
    {"run --heads 4 --dim 64 --queries 4 --backward --kernel cpu_prefill", 2,
     "has no backward pass"},
    {"bench --heads 4 --dim 64 --queries 4 --backward --against cpu_unfused", 2,
     "did you mean \"cpu_backward\"?"},
    {"check --backward --kernel cpu_prefill", 2, "did you mean \"cpu_backward\"?"},
    {"run nothing.safetensors", 2, "cannot open nothing.safetensors"},
    {"run /proc/self/status", 2, "safetensors"},
    {"check --cases many", 2, "valid: smoke, ci, full, layouts, ragged, corner"},
    {"check --kernel cpu_decod", 2, "did you mean \"cpu_decode\"?"},
    {"list models2", 2, "did you mean models?"},
};

TEST(Cli, PlansForRanksNameEveryStrategy) {
  const std::string problem = "plan --heads 8/2 --dim 64 --queries 4096 --causal --ranks 4 ";
  const std::string picture = testing::TempDir() + "widehead_timeline.svg";
  const Outcome outcome =
      widehead(problem + "--link 10GB/s,3us --threads 1 --json --timeline " + picture);
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const auto json = nlohmann::json::parse(outcome.out);
  EXPECT_EQ(json["ranks"], 4);
  EXPECT_EQ(json["link_latency_us"], 3);
  ASSERT_EQ(json["candidates"].size(), 5u);
  for (const auto& candidate : json["candidates"]) {
    EXPECT_EQ(candidate["workspace_bytes"].size(), 4u) << candidate;
    EXPECT_GE(candidate["estimated_us"], json["estimated_us"]);
  }
  std::ifstream file(picture);
  const std::string svg(std::istreambuf_iterator<char>(file), {});
  for (const char* text : {"rank 3</text>", "<title>attend: ", "from rank 0: "}) {
    EXPECT_NE(svg.find(text), std::string::npos) << text;
  }
  const Outcome table = widehead(problem + "--link 10GB/s --strategy heads --tokens contiguous");
  EXPECT_EQ(table.code, 0) << table.err;
  EXPECT_NE(table.out.find("the caller forces heads"), std::string::npos) << table.out;
  const std::pair<const char*, const char*> wrong[] = {
      {"--link 3furlongs", "must be a rate as in 400GB/s"},
      {"", "--link is missing"},
      {"--link 1GB/s --tokens odd", "valid: contiguous, zigzag"},
      {"--link 1GB/s --strategy star", "valid: ring, gather, heads, queries, one_rank"},
      {"--link 1GB/s --card h200", "needs --device cuda"},
      {"--link 1GB/s --backward", "must be of the forward pass"}};
  for (const auto& [flags, message] : wrong) {
    const Outcome refused = widehead(problem + flags);
    EXPECT_EQ(refused.code, 2) << flags;
    EXPECT_NE(refused.err.find(message), std::string::npos) << refused.err;
  }
  EXPECT_EQ(widehead("plan " + kSmall + "--link 1GB/s").code, 2);
}

TEST(Cli, RanksOnThreadsAgreeWithFloat64) {
  const std::string problem = "run " + kSmall + "--causal --threads 1 ";
  for (const char* strategy : {"ring", "gather", "queries", "one_rank"}) {
    const Outcome outcome = widehead(
        problem + "--parallel threads --ranks 3 --link 10GB/s --json " + "--strategy " + strategy);
    ASSERT_EQ(outcome.code, 0) << outcome.err;
    const auto json = nlohmann::json::parse(outcome.out);
    EXPECT_EQ(json["strategy"], strategy);
    EXPECT_EQ(json["ranks"], 3);
    EXPECT_EQ(json["workspace_bytes"].size(), 3);
    EXPECT_GT(json["relative_rms"], 0);
    EXPECT_LE(json["relative_rms"], json["tolerance"]);
  }
  const Outcome paged = widehead(problem + "--pages 5 --parallel threads --ranks 3 --json");
  ASSERT_EQ(paged.code, 0) << paged.err;
  const auto of_pages = nlohmann::json::parse(paged.out);
  EXPECT_EQ(of_pages["strategy"], "queries");
  EXPECT_LE(of_pages["relative_rms"], of_pages["tolerance"]);
  const Outcome every = widehead(problem + "--parallel threads --ranks 2 --every-strategy --json");
  ASSERT_EQ(every.code, 0) << every.err;
  const auto all = nlohmann::json::parse(every.out);
  EXPECT_EQ(all["strategies"].size(), 5);
  for (const auto& one : all["strategies"]) {
    EXPECT_LE(one["relative_rms"], all["tolerance"]) << one["strategy"];
    EXPECT_GT(one["best_us"], 0);
  }
  const std::pair<const char*, const char*> wrong[] = {
      {"--every-strategy", "no effect on one device"},
      {"--parallel threads", "--ranks is missing"},
      {"--parallel nccl", "NCCL"},
      {"--ranks 2", "--ranks has no effect on one device"},
      {"--parallel pigeons", "it is \"pigeons\"; valid: mpi, nccl, threads"}};
  for (const auto& [flags, message] : wrong) {
    const Outcome refused = widehead(problem + flags);
    EXPECT_NE(refused.code, 0) << flags;
    EXPECT_NE(refused.err.find(message), std::string::npos) << flags << refused.err;
  }
}

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
  const Outcome backward = widehead("check --backward --cases large --shrink 128 --runs 2 --json");
  ASSERT_EQ(backward.code, 0) << backward.err << backward.out;
  const auto gradients = nlohmann::json::parse(backward.out);
  EXPECT_EQ(gradients["pass"], "backward");
  ASSERT_EQ(gradients["kernels"].size(), 1u);  // not the oracle, on large cases
  EXPECT_EQ(gradients["kernels"][0]["kernel"], "cpu_backward");
  EXPECT_EQ(gradients["kernels"][0]["checked"], gradients["case_count"]);
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
