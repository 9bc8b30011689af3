// Cases of the sizes that people run: more tiles than a GPU has multiprocessors, so that counters
// of tiles, rings over many tiles and sections of heads work; and the longest contexts that must
// run.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "cases.h"

namespace wh {
namespace {

constexpr int64_t kSampledRows = 48;

struct Shape {
  Dtype dtype;
  int64_t heads_q, heads_kv, dim_qk, dim_v, len_q, len_k;
  Causal causal = Causal::kNone;
  int64_t batch = 1;
};

class LargeCases {
 public:
  LargeCases(Device device, uint64_t seed, int64_t shrink)
      : device_(device), seed_(seed), shrink_(shrink) {}

  // Of a length, or of a window: never 0.
  int64_t shrunk(int64_t length) const { return (length + shrink_ - 1) / shrink_; }

  Case& add(const Shape& shape) {
    Case& c = cases_.emplace_back();
    Problem& p = c.problem;
    p.device = device_;
    p.dtype_q = p.dtype_kv = shape.dtype;
    p.batch = shape.batch;
    p.heads_q = shape.heads_q;
    p.heads_kv = shape.heads_kv;
    p.len_q = shape.len_q == 1 ? 1 : shrunk(shape.len_q);
    p.len_k = shrunk(shape.len_k);
    p.dim_qk = shape.dim_qk;
    p.dim_v = shape.dim_v;
    p.causal = shape.causal;
    p.wants_log_sum_exp = true;
    set_dense(p);
    c.sampled_rows = kSampledRows;
    c.seed = seed_ + cases_.size();
    return c;
  }

  // Of batch entry b: a bit less than the one before, down to none; keys start later and later.
  void limit_keys(Case& c) const {
    Problem& p = c.problem;
    p.has_key_lengths = p.has_key_starts = true;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t length = p.len_k * (p.batch - 1 - b) / std::max<int64_t>(1, p.batch - 1);
      c.key_lengths.push_back(static_cast<int32_t>(length));
      c.key_starts.push_back(static_cast<int32_t>(b * length / (2 * p.batch)));
    }
  }

  void add_mask(Case& c, MaskKind kind, bool is_every_heads) const {
    Problem& p = c.problem;
    p.mask = kind;
    p.stride_mask = dense_strides(p.heads_q, p.len_q, p.len_k);
    if (!is_every_heads) return;
    p.stride_mask = {p.len_q * p.len_k, 0, p.len_k, 1};
  }

  std::vector<Case> take() {
    for (Case& c : cases_) c.name = describe(c.problem) + (c.v_is_k ? ", V in K" : "");
    return std::move(cases_);
  }

 private:
  Device device_;
  uint64_t seed_;
  int64_t shrink_;
  std::vector<Case> cases_;
};

constexpr Dtype kBf16 = Dtype::kBf16, kF16 = Dtype::kF16, kF32 = Dtype::kF32;
constexpr Causal kBottomRight = Causal::kBottomRight;

void add_prefill(LargeCases& cases) {
  cases.add({kBf16, 64, 2, 256, 256, 2048, 32768, kBottomRight});
  cases.add({kBf16, 16, 16, 256, 256, 8192, 8192, kBottomRight, 2});
  cases.add({kF16, 16, 16, 128, 128, 8192, 8192});
  cases.add({kBf16, 32, 32, 64, 64, 4096, 4096, kBottomRight, 2});
  cases.add({kF16, 32, 32, 64, 64, 4001, 4001});
  cases.add({kBf16, 16, 16, 192, 192, 3000, 5000, kBottomRight});
  cases.add({kBf16, 16, 16, 192, 128, 8192, 8192, kBottomRight});
  cases.add({kF16, 16, 4, 192, 256, 2048, 8192, kBottomRight});
  cases.add({kBf16, 16, 4, 320, 256, 2048, 8192, kBottomRight});
  cases.add({kBf16, 32, 4, 512, 512, 4096, 4096, kBottomRight});
  cases.add({kF16, 8, 8, 512, 512, 4001, 4096});
  cases.add({kBf16, 64, 1, 576, 512, 1024, 4096, kBottomRight});
  cases.add({kBf16, 12, 12, 112, 112, 2500, 6000, Causal::kTopLeft});
  cases.add({kF16, 8, 8, 104, 104, 3001, 5003, kBottomRight});
  cases.add({kBf16, 8, 2, 100, 100, 3000, 5003, kBottomRight});
  cases.add({kF32, 8, 2, 128, 128, 1500, 8000, kBottomRight});
  cases.add({kF32, 4, 4, 512, 512, 1000, 2000});
  cases.add({kBf16, 4, 4, 1024, 1024, 1000, 2000, kBottomRight});
}

void add_features(LargeCases& cases) {
  Case* c = &cases.add({kBf16, 32, 8, 128, 128, 4096, 16384, kBottomRight});
  c->problem.window_left = cases.shrunk(1023);
  c = &cases.add({kF16, 16, 8, 256, 256, 3001, 3001});
  c->problem.softcap = 50;
  c->problem.window_left = cases.shrunk(900);
  c->problem.window_right = cases.shrunk(300);
  cases.limit_keys(cases.add({kBf16, 16, 4, 256, 256, 1000, 8192, kBottomRight, 4}));
  cases.limit_keys(cases.add({kF16, 16, 2, 512, 512, 500, 4099, kBottomRight, 5}));
  cases.add({kBf16, 8, 2, 64, 64, 777, 777, kBottomRight, 16});
  c = &cases.add({kBf16, 8, 2, 128, 128, 1500, 6000});
  cases.add_mask(*c, MaskKind::kBoolean, true);
  c->mask_pattern = MaskPattern::kWholeRows;
  c = &cases.add({kF16, 8, 8, 256, 256, 1024, 4096, kBottomRight});
  cases.add_mask(*c, MaskKind::kAdditiveQ, false);
  c->problem.has_sinks = true;
  c = &cases.add({kBf16, 8, 4, 512, 512, 700, 3000, kBottomRight});
  cases.add_mask(*c, MaskKind::kAdditiveF32, true);
  c->problem.softcap = 30;
}

void add_decode(LargeCases& cases) {
  cases.add({kBf16, 64, 2, 256, 256, 1, 65536});
  cases.limit_keys(cases.add({kF16, 32, 8, 128, 128, 1, 8192, Causal::kNone, 16}));
  Case* c = &cases.add({kBf16, 32, 4, 512, 512, 1, 65536});
  c->problem.has_sinks = true;
  c = &cases.add({kBf16, 128, 1, 576, 512, 1, 32768});
  c->v_is_k = true;
  c->problem.stride_v = c->problem.stride_k;
  c = &cases.add({kF16, 8, 8, 64, 64, 1, 100000});
  c->limits.batch_invariant = true;
}

// The contexts that must run, whatever the offsets.
void add_longest(LargeCases& cases) {
  cases.add({kBf16, 64, 2, 256, 256, 1, 262144});
  cases.add({kBf16, 64, 2, 256, 256, 160, 262144, kBottomRight});
  cases.add({kBf16, 64, 2, 256, 256, 2048, 200000, kBottomRight});
  cases.add({kBf16, 32, 2, 512, 512, 1, 262144});
  cases.add({kBf16, 32, 2, 512, 512, 96, 262144, kBottomRight});
}

}  // namespace

std::vector<Case> make_large_cases(Device device, uint64_t seed, int64_t shrink) {
  LargeCases cases(device, seed, shrink);
  add_prefill(cases);
  add_features(cases);
  add_decode(cases);
  add_longest(cases);
  return cases.take();
}

}  // namespace wh
