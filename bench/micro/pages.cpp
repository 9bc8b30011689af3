// Decode and a chunk of a prompt over pages in random order, beside the same keys in a row.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "widehead/widehead.h"

namespace {

constexpr int64_t kBatch = 4, kKeys = 4096, kHeads = 2, kDim = 128;

// page_size 0: dense, token by token as pages are.
void attention(benchmark::State& state, int64_t len_q, int64_t page_size) {
  wh_problem p;
  wh_problem_init(&p, sizeof(p));
  p.batch = kBatch;
  p.heads_q = 4 * kHeads;
  p.heads_kv = kHeads;
  p.len_q = len_q;
  p.len_k = kKeys;
  p.dim_qk = p.dim_v = kDim;
  p.dtype_q = p.dtype_kv = WH_BF16;
  p.causal = WH_CAUSAL_BOTTOM_RIGHT;
  p.uses = WH_USES_KEY_LENGTHS;
  if (page_size > 0) {
    p.key_layout = WH_KEYS_PAGED;
    p.page_size = page_size;
    p.pages = kBatch * kKeys / page_size;
  }
  wh_problem_set_dense(&p);
  if (page_size == 0) {
    const int64_t by_token[] = {kKeys * kHeads * kDim, kDim, kHeads * kDim, 1};
    std::copy_n(by_token, 4, p.stride_k);
    std::copy_n(by_token, 4, p.stride_v);
  }
  // Small numbers of alternating signs; the time does not depend on them.
  const auto values = [](int64_t count) {
    std::vector<uint16_t> bits(static_cast<size_t>(count));
    for (size_t i = 0; i < bits.size(); ++i) {
      bits[i] = static_cast<uint16_t>(0x3d00 + i % 97 + (i % 2 << 15));
    }
    return bits;
  };
  const int64_t rows = kBatch * p.heads_q * len_q;
  const std::vector<uint16_t> q = values(rows * kDim), k = values(kBatch * kKeys * kHeads * kDim),
                              v = k;
  std::vector<uint16_t> out(q.size());
  const std::vector<int32_t> lengths(kBatch, kKeys);
  std::vector<int32_t> table(static_cast<size_t>(p.pages));
  std::iota(table.begin(), table.end(), 0);
  std::shuffle(table.begin(), table.end(), std::mt19937(1));
  wh_tensors t;
  wh_tensors_init(&t, sizeof(t));
  t.q = q.data();
  t.k = k.data();
  t.v = v.data();
  t.out = out.data();
  t.key_lengths = lengths.data();
  t.page_table = table.data();
  for (auto _ : state) {
    if (wh_attention(&p, nullptr, &t, nullptr) != WH_OK) {
      state.SkipWithError(wh_last_error());
      break;
    }
  }
}

// Turn by turn, so that a machine that slows down does so for all.
void add(const std::string& name, int64_t len_q) {
  for (const int64_t page_size : {0, 16, 64, 256}) {
    const std::string layout = page_size == 0 ? "dense" : "pages_of_" + std::to_string(page_size);
    benchmark::RegisterBenchmark((name + "/" + layout).c_str(), attention, len_q, page_size)
        ->Unit(benchmark::kMicrosecond)
        ->UseRealTime();
  }
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  add("decode", 1);
  add("chunk", 256);
  benchmark::RunSpecifiedBenchmarks();
}
