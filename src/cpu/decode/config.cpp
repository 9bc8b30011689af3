#include "cpu/decode/config.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/rounding.h"
#include "cpu/common/cost.h"
#include "cpu/common/steps.h"
#include "cpu/cpu_facts.h"
#include "cpu/decode/kernel.h"
#include "plan/work.h"

namespace wh::cpu {
namespace {

// More rows than this belong to prefill, whose tiles of queries amortise every load of K and V.
constexpr int64_t kMostRows = 128;
// 24 KB of f16 at dim 256: a tile of K stays in L1, and is made of whole blocks of 3, 8 and 16
// keys.
constexpr int64_t kTileKeys = 48;
constexpr int64_t kColumnRounding = 16;

// A tile within a page is read in place; of pages that are shorter than 16 keys it is gathered.
// Tiles of 16 cost pages of 16 a fifth of the time of dense keys. Gathering those took twice the
// time, and tiles of three pages, read page by page with one softmax for all, as long.
int64_t tile_keys(const Problem& p) {
  constexpr int64_t kLeast = 16, kMost = 64;
  if (p.key_layout != KeyLayout::kPaged || p.page_size % kTileKeys == 0) return kTileKeys;
  for (int64_t keys = kMost; keys >= kLeast; --keys) {
    if (p.page_size % keys == 0) return keys;
  }
  return kTileKeys;
}

std::optional<std::string> refusal(const Query& query) {
  const int64_t rows = query.problem.len_q * query.problem.group();
  if (rows <= kMostRows) return std::nullopt;
  return fmt::format("takes at most {} query rows a kv head, these are {}", kMostRows, rows);
}

// Enough chunks for every core of a large machine, but none so short that its partial rows show
// next to the keys that it reads. The rule looks at the shape and not at the threads: the bits of a
// row must not depend on those.
Config configure(const Query& query) {
  const Problem& p = query.problem;
  Config config;
  config.workers = cpu_facts(query).threads(query.limits.threads);
  config.tile_k = tile_keys(p);
  const int64_t batch = query.limits.batch_invariant ? 1 : std::max<int64_t>(1, p.batch);
  const int64_t least = std::max<int64_t>(512, 32 * p.len_q * p.group());
  const int64_t keys = most_visible_keys(p);
  const int64_t wanted = std::min(divide_up(128, batch * p.heads_kv), keys / least);
  if (wanted > 1) config.chunk_keys = round_up(divide_up(keys, wanted), config.tile_k);
  return config;
}

size_t workspace_bytes(const Problem& p, const Config& config) {
  return DecodeWorkspace(p, config, nullptr).bytes();
}

// Cycles. Registers decide: with 32 of them a block is 8 rows, with 16 it is 4, as in block-inl.h.
struct Costs {
  int64_t block_rows;
  double block, block_row;               // a key and vector of dims
  double softmax_block, softmax_vector;  // a key; the latter a vector of rows
  double move_row;                       // a row and dim
  double merge_row;                      // a chunk's row and dim
  double item;
};

// Fitted to 190 problems of 16 to 16384 keys, dims 64 to 512 and 1 to 128 rows on AVX-512: 15 %
// RMS.
constexpr Costs kOf32Registers{8, 0.8, 0.56, 9.5, 15, 0.5, 3.2, 770};
// Fitted to 79 such problems on a Zen 5's AVX2, 11 % RMS, and then a tenth more for the products:
// at 64 rows a Zen 5 does not care (0.9 to 1.0 of prefill's time), but a Zen 3 had prefill ahead by
// 8 to 36 %. With the costs of 32 registers 16 rows went to prefill, at up to 1.5 times the time.
constexpr Costs kOf16Registers{4, 0.74, 0.38, 1.7, 12, 0.7, 1.8, 520};

const Costs& costs_of(const CpuFacts& cpu) {
  return cpu.simd_floats >= 16 ? kOf32Registers : kOf16Registers;
}

// Cycles of widening a vector of codes beyond one of f16, in each block of rows. Fitted to what 48
// problems of 1024 keys, dims 64 to 256 and 1 to 16 rows took beside f16 on a Zen 5's AVX-512: 17
// to 30 % RMS, most of it at one row, where 256 wide f16 no longer fits the L2.
double widen_cycles(Quantised format) {
  switch (format) {
    case Quantised::kNone:
      return 0;
    case Quantised::kE4m3:
      return 2.8;
    case Quantised::kInt8:
      return 0.6;
    case Quantised::kQ8_0:
      return 1.3;
    case Quantised::kQ4_0:
      return 1.0;
  }
  __builtin_unreachable();  // validate() knows no other
}

constexpr double kHidden = 0.2;  // of the shorter of reading and computing: they overlap

// Cycles of a key against the rows of a head.
double key_cycles(const Query& query, const DecodeShape& shape) {
  const Costs& cost = costs_of(cpu_facts(query));
  const double lanes = cpu_facts(query).simd_floats;
  const auto rows = static_cast<double>(shape.rows);
  const int64_t rest = shape.rows % cost.block_rows;
  const auto blocks =
      static_cast<double>(shape.rows / cost.block_rows + rest / 4 + rest % 4 / 2 + rest % 2);
  const Problem& p = query.problem;
  const auto dim_qk = static_cast<double>(p.dim_qk), dim_v = static_cast<double>(p.dim_v);
  const double widen = dim_qk * widen_cycles(p.quantised_k) + dim_v * widen_cycles(p.quantised_v);
  return (dim_qk + dim_v) / lanes * (blocks * cost.block + rows * cost.block_row) +
         blocks * widen / lanes + blocks * cost.softmax_block + rows / lanes * cost.softmax_vector;
}

double estimate_us(const Query& query, const Config& config) {
  constexpr double kCallUs = 1;
  const Problem& p = query.problem;
  const Costs& cost = costs_of(cpu_facts(query));
  const DecodeShape shape(p, config);
  const auto rows = static_cast<double>(shape.rows);
  const auto dims = static_cast<double>(p.dim_qk + p.dim_v);
  // A tile is computed for every row when any row sees it.
  const auto keys = static_cast<double>(most_visible_keys(p));
  const auto items = static_cast<double>(shape.items);
  double head_cycles = keys * key_cycles(query, shape) + rows * dims * cost.move_row;
  if (shape.chunks > 1) {
    head_cycles +=
        static_cast<double>(shape.chunks) * rows * static_cast<double>(p.dim_v) * cost.merge_row;
  }
  const double cycles = head_cycles * static_cast<double>(p.batch * p.heads_kv) + items * cost.item;
  const double at_work =
      std::clamp(items, 1.0, static_cast<double>(std::min(config.workers, cpu_facts(query).cores)));
  const double compute_us = cycles * cycle_us(cpu_facts(query)) / at_work;
  const double memory_us =
      read_us(cpu_facts(query), kv_bytes(p) * keys / std::max(1.0, static_cast<double>(p.len_k))) *
      cpu_facts(query).cores / at_work;
  return std::max(compute_us, memory_us) + std::min(compute_us, memory_us) * kHidden + kCallUs;
}

// All rows against as many tiles of keys as are worth a look, or a block of rows that are merged.
double step_us(const Query& query, const Config& config) {
  const Problem& p = query.problem;
  const Costs& cost = costs_of(cpu_facts(query));
  const DecodeShape shape(p, config);
  const int64_t tiles = pieces_between_looks(tile_work(p, shape.rows, {0, shape.tile_k}));
  const auto keys = static_cast<double>(std::min(shape.chunk_keys, tiles * shape.tile_k));
  const auto dims = static_cast<double>(p.dim_qk + p.dim_v);
  const double tile_cycles =
      keys * key_cycles(query, shape) + static_cast<double>(shape.rows) * dims * cost.move_row;
  const int64_t merged = shape.chunks > 1 ? std::min(kRowsPerMerge, shape.rows) * shape.chunks : 0;
  const double merge_cycles = static_cast<double>(merged * p.dim_v) * cost.merge_row;
  return step_us_of(query, config, std::max(tile_cycles, merge_cycles), keys);
}

}  // namespace

DecodeShape::DecodeShape(const Problem& p, const Config& config)
    : rows(p.len_q * p.group()),
      tile_k(config.tile_k),
      chunks(config.chunk_keys > 0 ? divide_up(most_visible_keys(p), config.chunk_keys) : 1),
      chunk_keys(chunks > 1 ? config.chunk_keys : p.len_k),
      items(p.batch * p.heads_kv * chunks),
      columns_qk(round_up(p.dim_qk, kColumnRounding)),
      columns_v(round_up(p.dim_v, kColumnRounding)),
      has_mask(p.mask != MaskKind::kNone) {}

// A window's chunks start where its first query's keys do: counting from key 0 would leave most of
// them empty.
KeyRange chunk_range(const Problem& p, const Sequence& sequence, const DecodeShape& shape,
                     int64_t chunk) {
  if (shape.chunks == 1) return {0, p.len_k};
  const int64_t origin = std::clamp<int64_t>(visible_keys(p, sequence, 0).begin, 0, p.len_k);
  const int64_t begin = origin + chunk * shape.chunk_keys;
  return {begin, begin + shape.chunk_keys};
}

// Ranges move with the query and leave no gaps: the first query begins and the last one ends.
KeyRange keys_of_chunk(const Problem& p, const Sequence& sequence, const DecodeShape& shape,
                       int64_t chunk_idx) {
  const KeyRange chunk = chunk_range(p, sequence, shape, chunk_idx);
  const KeyRange keys{std::max(chunk.begin, visible_keys(p, sequence, 0).begin),
                      std::min(chunk.end, visible_keys(p, sequence, sequence.len_q - 1).end)};
  return keys.empty() ? KeyRange{0, 0} : keys;
}

DecodeScratch::DecodeScratch(Carver& carver, const DecodeShape& shape) {
  q = carver.take<float>(shape.rows * shape.columns_qk);
  o = carver.take<float>(shape.rows * shape.columns_v);
  k = carver.take<float>(shape.tile_k * shape.columns_qk);
  v = carver.take<float>(shape.tile_k * shape.columns_v);
  s = carver.take<float>(shape.rows * shape.tile_k);
  bias = shape.has_mask ? carver.take<float>(shape.tile_k) : nullptr;
  m = carver.take<float>(shape.rows * kLaneStride);
  l = carver.take<float>(shape.rows * kLaneStride);
  alpha = carver.take<float>(shape.rows * kLaneStride);
  first = carver.take<int32_t>(shape.rows);
  last = carver.take<int32_t>(shape.rows);
}

DecodeWorkspace::DecodeWorkspace(const Problem& p, const Config& config, void* base)
    : shape(p, config),
      workers(static_cast<int32_t>(std::min<int64_t>(config.workers, shape.items))),
      chunks_left(nullptr),
      base_(static_cast<std::byte*>(base)) {
  Carver carver(base);
  partials.chunks = shape.chunks;
  if (shape.chunks > 1) {
    partials.rows = p.batch * p.heads_kv * shape.rows;
    partials.dim_v = p.dim_v;
    partials.carve(carver);
    chunks_left = carver.take<std::atomic<int32_t>>(p.batch * p.heads_kv);
  }
  Carver measure(nullptr);
  DecodeScratch(measure, shape);
  scratches_ = {carver, measure};
}

DecodeScratch DecodeWorkspace::scratch(int32_t worker) const {
  Carver carver(scratches_.at(base_, worker));
  return DecodeScratch(carver, shape);
}

int64_t DecodeWorkspace::work(const Problem& p, const Tensors& t) const {
  int64_t work = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence sequence = sequence_at(p, t, b);
    const int64_t rows = sequence.len_q * p.group();
    if (rows == 0) continue;
    for (int64_t chunk = 0; chunk < shape.chunks; ++chunk) {
      work += tile_work(p, rows, keys_of_chunk(p, sequence, shape, chunk)) + store_work(p, rows);
    }
    work += merge_work(partials, rows);
  }
  return work * p.heads_kv;
}

const Kernel kDecode{
    .name = "cpu_decode",
    .role = Role::kFused,
    .summary = "few queries, keys split into chunks, each read once for a whole group",
    .takes_all_layouts = true,
    .refusal = refusal,
    .configure = configure,
    .variant =
        [](const Query& query, const Config&) {
          const char* widens =
              is_quantised(query.problem) ? ", codes widened as they are read" : "";
          return cpu_facts(query).isa + " f32" + widens;
        },
    .workspace_bytes = workspace_bytes,
    .estimate_us = estimate_us,
    .run = run_decode,
    .step_us = step_us,
    .reads_quantised = true};

}  // namespace wh::cpu
