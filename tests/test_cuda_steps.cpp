// How CUDA calls are cut into launches, and what is done between two of them, checked without a
// GPU.
#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <string>
#include <vector>

#include "api/machine.h"
#include "cuda/common/steps.h"
#include "cuda/cuda_facts.h"
#include "cuda/device.h"
#include "cuda/registry.h"
#include "cuda/sm90/query_tiles.h"
#include "cuda/unfused/config.h"
#include "plan/plan_json.h"
#include "plan/planner.h"
#include "support/cards.h"
#include "support/problems.h"

namespace wh {
namespace {

Machine h100_machine(Device, int32_t) {
  static const CudaFacts facts = h100();
  return {facts, cuda::kernels()};
}

Problem chunk(int64_t len_k, Dtype dtype = Dtype::kBf16) {
  return chunk(len_k, dtype, Device::kCuda);
}

Plan plan(const Problem& problem, double longest_step_us, const std::string& kernel = "") {
  Limits limits;
  limits.longest_step_us = longest_step_us;
  limits.kernel = kernel;
  const Result<Plan> made = make_plan(problem, limits, h100_machine(Device::kCuda, 0));
  EXPECT_TRUE(made.ok()) << made.status().message();
  return made.ok() ? *made : Plan{};
}

const Candidate& candidate(const Plan& plan, const std::string& kernel) {
  for (const Candidate& one : plan.candidates) {
    if (one.kernel == kernel) return one;
  }
  ADD_FAILURE() << "no candidate " << kernel;
  return plan.candidates.front();
}

// What the blocks or clusters of one launch work on: dealt in turn, or claimed in any order.
void work_on(const cuda::TileOrder& order, int32_t workers, bool is_claimed,
             std::multiset<int32_t>& seen) {
  if (!is_claimed) {
    for (int32_t worker = 0; worker < workers; ++worker) {
      for (int32_t i = first_tile(order, worker); i < order.end; i += workers) seen.insert(i);
    }
    return;
  }
  for (int32_t worker = 0; worker < workers; ++worker) {
    if (first_tile(order, worker) < order.end) seen.insert(first_tile(order, worker));
  }
  for (int32_t claim = 0; claimed_tile(order, workers, claim) < order.end; ++claim) {
    seen.insert(claimed_tile(order, workers, claim));
  }
}

TEST(CudaSteps, EveryTileIsWorkedOnOnceWhateverTheStep) {
  const Problem p = chunk(4096);
  const cuda::TileOrder order = cuda::tile_order(p, 128, 1);
  ASSERT_EQ(order.tiles, 1024);
  const Tensors tensors;
  for (const int64_t step_tiles : {0, 1, 7, 132, 264, 1000, 1024, 5000}) {
    for (const int32_t workers : {1, 66, 132}) {
      for (const bool is_claimed : {false, true}) {
        Config config;
        config.step_tiles = step_tiles;
        Progress unwatched;
        const Launch launch{p, config, tensors, default_executor(), unwatched};
        std::multiset<int32_t> seen;
        int64_t next = 0;
        const Status status =
            cuda::run_in_steps(launch, order.tiles, [&](int64_t first, int64_t end) -> Status {
              EXPECT_EQ(first, next) << "ranges are in order, without gaps";
              EXPECT_LE(end - first, step_tiles == 0 ? order.tiles : step_tiles);
              next = end;
              cuda::TileOrder part = order;
              part.begin = static_cast<int32_t>(first);
              part.end = static_cast<int32_t>(end);
              work_on(part, static_cast<int32_t>(std::min<int64_t>(workers, end - first)),
                      is_claimed, seen);
              return {};
            });
        ASSERT_TRUE(status.ok());
        ASSERT_EQ(seen.size(), 1024u);
        ASSERT_EQ(std::set<int32_t>(seen.begin(), seen.end()).size(), 1024u);
        ASSERT_EQ(*seen.begin(), 0);
        ASSERT_EQ(*seen.rbegin(), 1023);
      }
    }
  }
}

// Events, launches and reports in the order in which they came.
struct Log {
  std::vector<std::string> lines;
  int stop_at = 0;  // the report that answers with a wish to stop; 0: none

  Status mark(int64_t step) {
    lines.push_back("mark " + std::to_string(step));
    return {};
  }
  Status wait(int64_t step) {
    lines.push_back("wait " + std::to_string(step));
    return {};
  }
  static int32_t report(void* context, double fraction) {
    auto& log = *static_cast<Log*>(context);
    log.lines.push_back("report " + std::to_string(std::lround(fraction * 100)));
    return --log.stop_at == 0 ? 1 : 0;
  }
  Status run(int64_t tiles, int64_t step_tiles) {
    Progress progress(report, this);
    return cuda::run_watched_steps(
        progress, tiles, step_tiles, *this, [&](int64_t first, int64_t end) -> Status {
          lines.push_back("launch " + std::to_string(first) + "-" + std::to_string(end));
          return {};
        });
  }
};

using Lines = std::vector<std::string>;

TEST(CudaSteps, OneLaunchIsInFlightWhileTheOneBeforeIsReported) {
  Log log;
  EXPECT_TRUE(log.run(10, 3).ok());
  EXPECT_EQ(log.lines, (Lines{"launch 0-3", "mark 0", "launch 3-6", "mark 1", "wait 0", "report 25",
                              "launch 6-9", "mark 2", "wait 1", "report 50", "launch 9-10",
                              "mark 3", "wait 2", "report 75", "wait 3", "report 100"}));
  Log whole;
  EXPECT_TRUE(whole.run(10, 10).ok());
  EXPECT_EQ(whole.lines, (Lines{"launch 0-10", "mark 0", "wait 0", "report 100"}));
}

TEST(CudaSteps, StopsLaunchingWhenToldToAndWaitsForWhatIsInFlight) {
  Log log;
  log.stop_at = 2;
  const Status status = log.run(10, 2);
  EXPECT_EQ(status.code(), Code::kCancelled);
  EXPECT_NE(status.message().find("out is partly written"), std::string::npos) << status.message();
  EXPECT_EQ(log.lines, (Lines{"launch 0-2", "mark 0", "launch 2-4", "mark 1", "wait 0", "report 20",
                              "launch 4-6", "mark 2", "wait 1", "report 40", "wait 2"}));
}

TEST(CudaSteps, AStopAfterTheLastLaunchIsTooLate) {
  Log log;
  log.stop_at = 3;
  EXPECT_TRUE(log.run(4, 1).ok());
  EXPECT_EQ(log.lines.back(), "wait 3");
}

TEST(CudaSteps, ALaunchThatFailsEndsTheCall) {
  Log log;
  Progress progress(Log::report, &log);
  int launches = 0;
  const Status status =
      cuda::run_watched_steps(progress, 10, 1, log, [&](int64_t first, int64_t) -> Status {
        ++launches;
        return first == 2 ? Status(Code::kDeviceError, "no") : Status();
      });
  EXPECT_EQ(status.code(), Code::kDeviceError);
  EXPECT_EQ(launches, 3);
}

TEST(CudaSteps, WholeWavesFillAStep) {
  const Plan made = plan(chunk(204800), 20e3);
  ASSERT_EQ(made.kernel, "sm90_prefill");
  EXPECT_GT(made.config.step_tiles, 0);
  EXPECT_EQ(made.config.step_tiles % made.config.workers, 0);
  EXPECT_LT(made.config.step_tiles, 1024);
  EXPECT_EQ(plan(chunk(204800), 0).config.step_tiles, 0);
  // Cutting costs no memory.
  EXPECT_EQ(made.workspace_bytes, plan(chunk(204800), 0).workspace_bytes);
}

// 50 ms at 200,000 keys, where one launch over all of them takes longer on most kernels.
TEST(CudaSteps, VerdictsForABoundOf50Milliseconds) {
  const Problem p = chunk(204800);
  const Plan made = plan(p, 50e3);
  EXPECT_EQ(made.kernel, "sm90_prefill");
  for (const char* kernel : {"sm90_prefill", "sm90_prefill_wide", "cuda_portable"}) {
    const Plan forced = plan(p, 50e3, kernel);
    ASSERT_EQ(forced.kernel, kernel) << candidate(forced, kernel).reason;
    const Machine machine = h100_machine(Device::kCuda, 0);
    const Query query{forced.problem, forced.limits, machine.facts};
    const double step_us = find_kernel(machine.kernels, kernel)->step_us(query, forced.config);
    EXPECT_LE(step_us, 50e3) << kernel;
    EXPECT_GT(step_us, 1e3) << kernel;
    EXPECT_EQ(forced.config.step_tiles == 0, forced.estimated_us <= 0.7 * 50e3) << kernel;
  }
  // One launch for all, which only few queries fit into.
  EXPECT_NE(candidate(made, "sm90_decode").reason.find("its longest step takes about"),
            std::string::npos)
      << candidate(made, "sm90_decode").reason;
  // A wave of tiles of 200,000 keys takes 4 to 5 ms.
  const Plan refused = plan(p, 1e3, "sm90_prefill");
  EXPECT_FALSE(refused.runnable());
  EXPECT_NE(candidate(refused, "sm90_prefill").reason.find("the limit is 1 ms"), std::string::npos)
      << candidate(refused, "sm90_prefill").reason;
}

TEST(CudaSteps, AMeasuredCorrectionShortensTheStep) {
  const Machine machine = h100_machine(Device::kCuda, 0);
  Limits limits;
  limits.longest_step_us = 25e3;
  const Problem p = chunk(204800);
  const Kernel& kernel = *find_kernel(machine.kernels, "sm90_prefill");
  Query query{p, limits, machine.facts};
  const int64_t by_formula = kernel.configure(query).step_tiles;
  query.correction = 1.6;
  const int64_t by_measurement = kernel.configure(query).step_tiles;
  EXPECT_LT(by_measurement, by_formula);
  EXPECT_LE(kernel.step_us(query, kernel.configure(query)) * query.correction, 25e3);
}

TEST(CudaSteps, SurvivesJson) {
  const Plan made = plan(chunk(204800), 20e3);
  ASSERT_GT(made.config.step_tiles, 0);
  const std::string json = to_json(made);
  EXPECT_NE(json.find("\"threads\": 0,\n    \"workers\": 132"), std::string::npos) << json;
  const Result<Plan> again = plan_from_json(json, h100_machine);
  ASSERT_TRUE(again.ok()) << again.status().message();
  EXPECT_EQ(*again, made);
  std::string edited = json;
  const std::string field = "\"step_tiles\": ";
  ASSERT_NE(edited.find(field), std::string::npos);
  edited.insert(edited.find(field) + field.size(), "1");
  EXPECT_FALSE(plan_from_json(edited, h100_machine).ok());
}

TEST(CudaUnfused, PrecisionHighPacksToF32) {
  const Machine machine = h100_machine(Device::kCuda, 0);
  Limits limits;
  const Problem half = chunk(1024), full = chunk(1024, Dtype::kF32);
  const auto config = [&](const Problem& p) {
    return cuda::kUnfused.configure({p, limits, machine.facts});
  };
  const Config native = config(half);
  limits.precision = Precision::kHigh;
  const Config high = config(half);
  EXPECT_EQ(cuda::UnfusedTypes(half, native).packed, Dtype::kBf16);
  EXPECT_EQ(cuda::UnfusedTypes(half, high).packed, Dtype::kF32);
  EXPECT_EQ(cuda::UnfusedTypes(half, high).tensors, Dtype::kBf16);
  EXPECT_EQ(cuda::kUnfused.workspace_bytes(half, high),
            cuda::kUnfused.workspace_bytes(full, config(full)));
  EXPECT_NE(cuda::kUnfused.workspace_bytes(half, high),
            cuda::kUnfused.workspace_bytes(half, native));
}

TEST(CudaStream, DefaultStreamsBelongToEveryDevice) {
  for (const uintptr_t handle : {0, 1, 2}) {
    EXPECT_TRUE(cuda::check_stream(0, reinterpret_cast<void*>(handle)).ok());
  }
}

}  // namespace
}  // namespace wh
