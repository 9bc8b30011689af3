#include "cuda/gradients/work.h"

#include <algorithm>

#include "cuda/common/steps.h"
#include "cuda/cuda_facts.h"
#include "cuda/gradients/items.h"
#include "plan/work.h"

namespace wh::cuda {
namespace {

constexpr double kStartUs = 12;  // of three launches or four

double sms(const Query& query) { return std::max(1, cuda_facts(query).sms); }

// Of one multiprocessor. A pair costs the blocks of queries three products and those of keys four,
// here half of seven each.
double pairs_us(const Query& query, const BackwardWork& work, double pairs) {
  const double sm_tflops = cuda_facts(query).tensor_tflops / sms(query);
  return pairs * (2.0 * work.dims.dim_qk + 1.5 * work.dims.dim_v) * 2 /
         (sm_tflops * 1e6 * work.share);
}

// The longest block: one that meets all that some tile may see.
double block_us(const Query& query, const BackwardWork& work) {
  const Problem& p = query.problem;
  const double of_queries =
      static_cast<double>(work.query_rows) *
      static_cast<double>(std::min(p.len_k, most_visible_keys(p, work.query_rows)));
  const double of_keys =
      static_cast<double>(work.key_rows) * static_cast<double>(p.len_q * p.group());
  return pairs_us(query, work, std::max(of_queries, of_keys)) / work.block_sms;
}

TileWaves waves_of(const Query& query, const BackwardWork& work) {
  return {BackwardBlocks(query.problem, work.query_rows, work.key_rows).all(),
          std::max(1, cuda_facts(query).sms / work.block_sms), kStartUs + block_us(query, work)};
}

}  // namespace

double backward_us(const Query& query, const BackwardWork& work) {
  const Problem& p = query.problem;
  // Rows of a tile cost what they cost, there or not; a diagonal's tile is half empty.
  const int64_t padded_q = (p.len_q + 15) / 16 * 16;
  const double pairs = visible_pairs(p) / std::max<double>(1, static_cast<double>(p.len_q)) *
                       static_cast<double>(padded_q * p.heads_q) * sequences(p);
  return kStartUs + std::max(2 * pairs_us(query, work, pairs) / sms(query), block_us(query, work));
}

int64_t backward_step_tiles(const Query& query, const BackwardWork& work) {
  if (query.limits.longest_step_us <= 0) return 0;
  return choose_step_tiles(query, waves_of(query, work), backward_us(query, work));
}

double backward_step_us(const Query& query, const BackwardWork& work, int64_t step_tiles) {
  return step_us_of(waves_of(query, work), step_tiles, backward_us(query, work));
}

}  // namespace wh::cuda
