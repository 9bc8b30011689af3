#include "cpu/prefill/config.h"

#include <algorithm>

#include "core/rounding.h"
#include "cpu/common/cost.h"
#include "cpu/common/steps.h"
#include "cpu/cpu_facts.h"
#include "cpu/prefill/kernel.h"
#include "plan/work.h"

namespace wh::cpu {
namespace {

// 96 keys: fewer cost 3-5 % in rescaling O, more gain nothing and leave no L1 for the scores.
constexpr int64_t kMostTileKeys = 96;
// Beyond 768 rows the widening of K and V (1 % of the time there) has nothing left to save.
constexpr int64_t kMostTileRows = 768;
// Less than three panels widen K and V for too few rows: 144 rows of the widest vectors.
constexpr int64_t kLeastItemPanels = 3;
constexpr int64_t kLeastItemRows = kLeastItemPanels * kPanelVectors * 16;
constexpr int64_t kEnoughItems = 64;  // for a big machine
constexpr int64_t kMostPartialBytes = 8 << 20;

int64_t panel_lanes(const Query& query) { return kPanelVectors * cpu_facts(query).simd_floats; }

double threads_at_work(const Query& query, const Config& config) {
  return std::min<double>(config.workers, cpu_facts(query).cores);
}

// Rows whose Q and O panels stay in L2 next to one K and V tile.
int64_t most_tile_rows(const Query& query, Arithmetic arithmetic) {
  const Problem& p = query.problem;
  const int64_t q_rows = arithmetic == Arithmetic::kF32 ? p.dim_qk : divide_up(p.dim_qk, 2);
  const int64_t lanes = panel_lanes(query);
  const int64_t in_l2 = cpu_facts(query).l2_bytes * 3 / 5 / ((q_rows + p.dim_v) * 4);
  return std::clamp(in_l2 / lanes * lanes, lanes, kMostTileRows / lanes * lanes);
}

// Splits keys only where the rows alone, cut as finely as they may be, are too few items for a big
// machine: cutting rows takes no memory, a chunk takes a partial row for each. Never so finely that
// writing and merging those shows (under 1 % from 4096 keys a chunk on), nor into more than a few
// MiB of them. The rule looks at the shape and not at the threads: the bits of a row must not
// depend on those. Behind a window most chunks would be empty.
int64_t chunk_keys(const Query& query, const Config& config) {
  const Problem& p = query.problem;
  if (most_visible_keys(p) < p.len_k) return 0;
  const int64_t heads = p.heads_kv * (query.limits.batch_invariant ? 1 : p.batch);
  const int64_t rows = p.len_q * p.group();
  const int64_t items = std::max<int64_t>(1, heads * divide_up(rows, kLeastItemRows));
  const int64_t chunk_bytes = heads * rows * (p.dim_v + 2) * 4;
  const int64_t wanted = std::min({kEnoughItems / items, p.len_k / (items < 8 ? 1024 : 4096),
                                   kMostPartialBytes / std::max<int64_t>(1, chunk_bytes)});
  return wanted > 1 ? round_up(divide_up(p.len_k, wanted), config.tile_k) : 0;
}

// The costs are cycles, fitted to 408 problems of 16 to 16384 keys, dims 64 to 512 and groups of 1
// to 8 on AVX-512: 10 % RMS.
constexpr double kPanelOf3 = 1.6, kPanelOf2 = 0.84, kPanelOf1 = 0.5;  // a key and dim
constexpr double kSoftmax = 9;                                        // a key and vector
constexpr double kWiden = 0.45;                                       // a key and dim of an item
constexpr double kMoveRow = 0.9;                                      // a row and dim
constexpr double kMergeRow = 4.8;                                     // a chunk's row and dim
constexpr double kItem = 1300;

// Cycles of a key against so many rows of a head, beside widening it.
double key_cycles(const Query& query, Arithmetic arithmetic, int64_t rows) {
  const Problem& p = query.problem;
  const bool is_f32 = arithmetic == Arithmetic::kF32;
  const double parts = arithmetic == Arithmetic::kBf16High ? 2 : 1;
  const double slowdown =
      is_f32 ? 1 : cpu_facts(query).gflops_per_core / cpu_facts(query).bf16_gflops_per_core;
  const int64_t lanes = panel_lanes(query);
  const int64_t tail = divide_up(rows % lanes, cpu_facts(query).simd_floats);
  const auto full_panels = static_cast<double>(rows / lanes + (tail == 3 ? 1 : 0));
  const double panels =
      full_panels * kPanelOf3 + (tail == 2 ? kPanelOf2 : 0) + (tail == 1 ? kPanelOf1 : 0);
  const double vectors = full_panels * 3 + static_cast<double>(tail % 3);
  return (static_cast<double>(p.dim_qk) + static_cast<double>(p.dim_v) * parts) * panels *
             slowdown +
         vectors * kSoftmax;
}

Config configure(const Query& query) { return configure_prefill(query, Arithmetic::kF32); }

}  // namespace

Config configure_prefill(const Query& query, Arithmetic arithmetic) {
  const Problem& p = query.problem;
  Config config;
  config.arithmetic = arithmetic;
  config.workers = cpu_facts(query).threads(query.limits.threads);
  const int64_t tile_bytes_a_key = (p.dim_qk + p.dim_v) * 4;
  config.tile_k =
      std::clamp<int64_t>(cpu_facts(query).l2_bytes / 4 / tile_bytes_a_key, 32, kMostTileKeys) / 8 *
      8;
  const int64_t lanes = panel_lanes(query);
  const int64_t rows = std::max<int64_t>(1, p.len_q * p.group());
  int64_t tiles = divide_up(rows, most_tile_rows(query, arithmetic));
  config.tile_q = round_up(divide_up(rows, tiles), lanes);
  config.chunk_keys = chunk_keys(query, config);
  // Four items a thread balance the load. A row's bits do not depend on its tile, so this may look
  // at the threads.
  const int64_t items_a_tile =
      std::max<int64_t>(1, PrefillShape(p, config, cpu_facts(query).simd_floats).items / tiles);
  tiles = std::max(tiles, std::min(divide_up(4 * config.workers, items_a_tile),
                                   divide_up(rows, kLeastItemPanels * lanes)));
  config.tile_q = round_up(divide_up(rows, tiles), lanes);
  return config;
}

size_t prefill_workspace_bytes(const Problem& p, const Config& config) {
  return PrefillWorkspace(p, config, nullptr).bytes();
}

double prefill_estimate_us(const Query& query, const Config& config) {
  constexpr double kDiagonal = 8;  // keys beyond the visible ones that a panel meets
  constexpr double kCallUs = 2;
  const Problem& p = query.problem;
  if (p.len_q == 0) return kCallUs;
  const PrefillShape shape(p, config, cpu_facts(query).simd_floats);
  const auto dims = static_cast<double>(p.dim_qk + p.dim_v), dim_v = static_cast<double>(p.dim_v);
  const double keys =
      visible_pairs(p) / static_cast<double>(p.len_q) + (p.causal == Causal::kNone ? 0 : kDiagonal);
  const auto rows = static_cast<double>(shape.rows_per_head);
  const double merge =
      shape.chunks > 1 ? static_cast<double>(shape.chunks) * rows * dim_v * kMergeRow : 0;
  const double head_cycles = keys * (key_cycles(query, config.arithmetic, shape.rows_per_head) +
                                     static_cast<double>(shape.q_tiles) * dims * kWiden) +
                             rows * dims * kMoveRow + merge;
  const auto items = static_cast<double>(shape.items);
  const double cycles =
      head_cycles * sequences(p) * static_cast<double>(p.heads_kv) + items * kItem;
  const double at_work = std::clamp(items, 1.0, threads_at_work(query, config));
  return cycles * cycle_us(cpu_facts(query)) / at_work +
         read_us(cpu_facts(query),
                 kv_bytes(p) * keys / std::max(1.0, static_cast<double>(p.len_k))) +
         kCallUs;
}

// A full tile of rows against as many tiles of keys as are worth a look, or a block of rows that
// are merged.
double prefill_step_us(const Query& query, const Config& config) {
  const Problem& p = query.problem;
  const PrefillShape shape(p, config, cpu_facts(query).simd_floats);
  const int64_t rows = std::min(shape.tile_q, shape.rows_per_head);
  const int64_t tiles = pieces_between_looks(tile_work(p, rows, {0, shape.tile_k}));
  const auto keys = static_cast<double>(std::min(p.len_k, tiles * shape.tile_k));
  const auto dims = static_cast<double>(p.dim_qk + p.dim_v);
  const double tile_cycles = keys * (key_cycles(query, config.arithmetic, rows) + dims * kWiden) +
                             static_cast<double>(rows) * dims * kMoveRow;
  const int64_t merged =
      shape.chunks > 1
          ? std::min(kRowsPerMerge, p.batch * p.heads_kv * shape.rows_per_head) * shape.chunks
          : 0;
  const double merge_cycles = static_cast<double>(merged * p.dim_v) * kMergeRow;
  return step_us_of(query, config, std::max(tile_cycles, merge_cycles), keys);
}

const Kernel kPrefill{
    .name = "cpu_prefill",
    .role = Role::kFused,
    .summary = "queries on SIMD lanes, grouped heads folded into rows",
    .takes_all_layouts = true,
    .refusal = [](const Query&) -> std::optional<std::string> { return std::nullopt; },
    .configure = configure,
    .variant =
        [](const Query& query, const Config&) {
          const char* widens = is_quantised(query.problem) ? ", codes widened once a tile" : "";
          return cpu_facts(query).isa + " f32" + widens;
        },
    .workspace_bytes = prefill_workspace_bytes,
    .estimate_us = prefill_estimate_us,
    .run = run_prefill,
    .step_us = prefill_step_us,
    .reads_quantised = true};

}  // namespace wh::cpu
