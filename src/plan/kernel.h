// What a kernel tells the planner, and how it is run. The registry is an ordered list of these;
// "can it" (refusal) and "should it" (estimate_us) are separate questions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "core/executor.h"
#include "core/problem.h"
#include "core/progress.h"
#include "core/status.h"
#include "plan/device_facts.h"
#include "plan/limits.h"

namespace wh {

// What a kernel is to the others.
enum class Role : uint8_t {
  kFused,      // the score matrix is never stored
  kBaseline,   // matmul, softmax, matmul: what a fused kernel is compared with
  kReference,  // the oracle, written for accuracy alone
};

// What multiplies. Weights are of the same type, unless it says otherwise.
enum class Arithmetic : uint8_t {
  kF64,
  kF32,
  kTf32x3,  // f32 as the sum of two TF32 numbers, three products of those
  kF16,
  kBf16,
  kBf16High,  // bf16, weights as the sum of two numbers
};

// The type's own.
constexpr Arithmetic arithmetic_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
      return Arithmetic::kF32;
    case Dtype::kF16:
      return Arithmetic::kF16;
    case Dtype::kBf16:
      return Arithmetic::kBf16;
  }
  __builtin_unreachable();  // validate() knows no other
}

// What a kernel was planned with, and all that it decides by at run time. Plain data: a plan
// stores, prints and reloads it. A field that a kernel has no use for keeps its default.
struct Config {
  Arithmetic arithmetic = Arithmetic::kF32;
  // What items are dealt to: the threads of a CPU kernel, each with a scratch of its own; the
  // blocks or clusters of a CUDA kernel. 0: each item has a block of its own.
  int32_t workers = 0;
  int32_t splits = 1;             // CUDA: blocks that share an item's keys
  int32_t instance = 0;           // CUDA: which compiled one, of the kernel's own list
  int64_t tile_q = 0;             // query rows an item covers
  int64_t tile_k = 0;             // keys a tile covers
  int64_t chunk_keys = 0;         // keys between two merges by log-sum-exp; 0: keys are not split
  int64_t fresh_keys = kAnyKeys;  // Limits::fresh_keys, where the kernel makes use of it
  int64_t step_tiles = 0;  // CUDA: tiles (blocks, passes) that one launch takes; 0: all of them
  bool operator==(const Config&) const = default;
};

struct Query {
  const Problem& problem;
  const Limits& limits;
  const DeviceFacts& facts;  // those of the kernel's own backend
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

// Filled with designated initialisers: a list of ten values by place says nothing.
struct Kernel {
  const char* name;
  Role role;
  const char* summary;
  Pass pass = Pass::kForward;
  // Asks core/sequence.h and core/key_rows.h where queries and keys lie; else the planner refuses
  // whatever is not dense.
  bool takes_all_layouts = false;

  std::optional<std::string> (*refusal)(const Query&);  // nullopt: it can
  Config (*configure)(const Query&);
  // The instruction set or arithmetic that the config stands for, for people to read.
  std::string (*variant)(const Query&, const Config&);
  size_t (*workspace_bytes)(const Problem&, const Config&);  // exact
  double (*estimate_us)(const Query&, const Config&);
  Status (*run)(const Launch&);
  // The longest piece between two looks at Launch::progress. Null: the whole call is one.
  double (*step_us)(const Query&, const Config&) = nullptr;
  // Whether it reads quantised keys and values; the planner refuses them for the others, whose
  // config would take codes for elements of dtype_kv.
  bool reads_quantised = false;

  bool is_fused() const { return role == Role::kFused; }
};

// Null: there is none of that name.
const Kernel* find_kernel(std::span<const Kernel* const> kernels, const std::string& name);

}  // namespace wh
