// Inside the threads of a host program: oneTBB arenas of its own, and its parallel loops.
#include <gtest/gtest.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "widehead/widehead.hpp"

namespace {

// 8/2 heads of 64 dimensions, in f32.
struct HostCall {
  int64_t len_q, len_k;
  const char* kernel;
  std::vector<float> q = random(8 * len_q * 64), k = random(2 * len_k * 64);
  std::vector<float> v = random(2 * len_k * 64);

  static std::vector<float> random(int64_t count) {
    std::mt19937 generator(static_cast<uint32_t>(count));
    std::normal_distribution<float> normal;
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = normal(generator);
    return values;
  }
  std::vector<float> run() const {
    const auto view = [](const std::vector<float>& data, int64_t heads, int64_t len) {
      return widehead::TensorView(data.data(), widehead::Dtype::kF32, {1, heads, len, 64});
    };
    std::vector<float> out(q.size(), std::numeric_limits<float>::quiet_NaN());
    widehead::Limits limits;
    limits.kernel = kernel;
    limits.threads = 2;
    widehead::attention(view(q, 8, len_q), view(k, 2, len_k), view(v, 2, len_k),
                        view(out, 8, len_q), {}, limits);
    return out;
  }
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

const HostCall kHostCalls[] = {
    {200, 300, "cpu_prefill"}, {1, 5000, "cpu_decode"}, {200, 300, "cpu_reference"}};

TEST(HostThreads, ArenasOfOneAndTwoThreadsGiveTheSameBits) {
  for (const HostCall& call : kHostCalls) {
    const std::vector<float> expected = call.run();
    for (const int threads : {1, 2}) {
      tbb::task_arena arena(threads);
      for (int i = 0; i < 3; ++i) {
        const std::vector<float> out = arena.execute([&] { return call.run(); });
        EXPECT_TRUE(same_bits(out, expected)) << call.kernel << " in an arena of " << threads;
      }
    }
  }
}

TEST(HostThreads, CallsFromInsideAParallelLoopGiveTheSameBits) {
  for (const HostCall& call : kHostCalls) {
    const std::vector<float> expected = call.run();
    std::vector<std::vector<float>> outs(8);
    tbb::parallel_for(size_t{0}, outs.size(), [&](size_t i) { outs[i] = call.run(); });
    for (const auto& out : outs) EXPECT_TRUE(same_bits(out, expected)) << call.kernel;
  }
}

}  // namespace
