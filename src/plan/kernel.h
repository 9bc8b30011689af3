// What a kernel tells the planner, and how it is run. The registry is an ordered list of these;
// "can it" (refusal) and "should it" (estimate_us) are separate questions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "core/executor.h"
#include "core/problem.h"
#include "core/progress.h"
#include "core/status.h"
#include "plan/cpu_facts.h"
#include "plan/cuda_facts.h"
#include "plan/limits.h"

namespace wh {

// The numbers a kernel was planned with. Plain data: a plan stores, prints and reloads it.
struct Config {
  std::string variant;     // the instruction set or arithmetic that runs, for people to read
  int32_t threads = 1;     // scratch is sized for this many workers; CUDA: blocks of the grid
  int64_t tile_q = 0;      // query rows an item covers
  int64_t tile_k = 0;      // keys a tile covers
  int64_t chunk_keys = 0;  // keys between two merges by log-sum-exp; 0: keys are not split
  int64_t fresh_keys = kAnyKeys;  // Limits::fresh_keys, where the kernel makes use of it
  int64_t step_tiles = 0;  // CUDA: tiles (blocks, passes) that one launch takes; 0: all of them
  bool operator==(const Config&) const = default;
};

struct Query {
  const Problem& problem;
  const Limits& limits;
  const CpuFacts& cpu;
  const CudaFacts& cuda;
  double correction = 1;  // a profile's, of measured time to formula, for the kernel that is asked
};

struct Launch {
  const Problem& problem;
  const Config& config;
  const Tensors& tensors;
  const Executor& executor;
  Progress& progress;
  void* stream = nullptr;  // cudaStream_t of a CUDA kernel; null is the default stream
};

struct Kernel {
  const char* name;
  Device device;
  bool is_fused;
  const char* summary;

  std::optional<std::string> (*refusal)(const Query&);  // nullopt: it can
  Config (*configure)(const Query&);
  size_t (*workspace_bytes)(const Problem&, const Config&);  // exact
  double (*estimate_us)(const Query&, const Config&);
  Status (*run)(const Launch&);
  // Of the longest piece between two looks at Launch::progress. Null: the whole call is one.
  double (*step_us)(const Query&, const Config&) = nullptr;
};

}  // namespace wh
