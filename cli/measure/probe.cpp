#include "measure/probe.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <fstream>

#include "core/executor.h"
#include "cpu/cpu_facts.h"
#include "measure/probe_bf16.h"
#include "verify/host_tensors.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "measure/probe.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace wh::cli::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// 12 independent chains: two pipes of four cycles need eight.
double multiply_add(int64_t repetitions) {
  const hn::ScalableTag<float> f32;
  const auto factor = hn::Set(f32, 0.999f);
  const auto term = hn::Set(f32, 0.001f);
  hn::Vec<decltype(f32)> chain[12];
  for (int i = 0; i < 12; ++i) chain[i] = hn::Set(f32, static_cast<float>(i));
  for (int64_t r = 0; r < repetitions; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) chain[i] = hn::MulAdd(chain[i], factor, term);
  }
  auto sum = chain[0];
  for (int i = 1; i < 12; ++i) sum = hn::Add(sum, chain[i]);
  return hn::GetLane(hn::SumOfLanes(f32, sum));
}

int64_t flops_each() { return 12 * 2 * static_cast<int64_t>(hn::Lanes(hn::ScalableTag<float>())); }

double sum_floats(const float* from, int64_t count) {
  const hn::ScalableTag<float> f32;
  const auto lanes = static_cast<int64_t>(hn::Lanes(f32));
  auto a = hn::Zero(f32), b = a, c = a, d = a;
  for (int64_t i = 0; i + 4 * lanes <= count; i += 4 * lanes) {
    a = hn::Add(a, hn::Load(f32, from + i));
    b = hn::Add(b, hn::Load(f32, from + i + lanes));
    c = hn::Add(c, hn::Load(f32, from + i + 2 * lanes));
    d = hn::Add(d, hn::Load(f32, from + i + 3 * lanes));
  }
  return hn::GetLane(hn::SumOfLanes(f32, hn::Add(hn::Add(a, b), hn::Add(c, d))));
}

}  // namespace wh::cli::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wh::cli {
HWY_EXPORT(multiply_add);
HWY_EXPORT(flops_each);
HWY_EXPORT(sum_floats);

namespace {

volatile double sink;  // keeps the probes' results alive

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Flops a second of work() on all threads, which does `flops`, in 1e9.
template <typename Work>
double gflops_at_once(int32_t threads, double flops, Work&& work) {
  // Threads start together: one that wakes up late would otherwise count as a slow core. Where one
  // thread runs all tasks in turn, the first gives up waiting and the rate says so.
  constexpr double kPatienceSeconds = 1e-3;
  std::atomic<int32_t> arrived{0};
  std::atomic<std::chrono::steady_clock::rep> start{0};
  parallel(default_executor(), threads, [&](int32_t) {
    const auto begin = std::chrono::steady_clock::now();
    ++arrived;
    while (arrived < threads && seconds_since(begin) < kPatienceSeconds) continue;
    std::chrono::steady_clock::rep none = 0;
    start.compare_exchange_strong(none,
                                  std::chrono::steady_clock::now().time_since_epoch().count());
    sink = work();
  });
  const std::chrono::steady_clock::time_point began{std::chrono::steady_clock::duration{start}};
  return flops * threads / seconds_since(began) * 1e-9;
}

// At 3 GHz with two pipes the 12 chains of a repetition take 6 cycles, 2 ns.
int64_t repetitions_in(double us) { return static_cast<int64_t>(us * 500); }

}  // namespace

double multiply_add_gflops(int32_t threads, double us) {
  const int64_t repetitions = repetitions_in(us);
  const auto flops = static_cast<double>(repetitions * HWY_DYNAMIC_DISPATCH(flops_each)());
  return gflops_at_once(threads, flops,
                        [&] { return HWY_DYNAMIC_DISPATCH(multiply_add)(repetitions); });
}

double bf16_gflops(int32_t threads) {
  double best = 0;
#if defined(__x86_64__)
  if (!cpu_facts().has_avx512_bf16) return 0;
  const int64_t repetitions = repetitions_in(300);
  for (int i = 0; i < 100; ++i) {
    best = std::max(best, gflops_at_once(threads, static_cast<double>(repetitions * kBf16Flops),
                                         [&] { return bf16_products(repetitions); }));
  }
#endif
  return best;
}

int64_t last_level_cache_bytes() {
  // Not sysconf(): on virtual Zen cores it answers eight times what one core can reach.
  int64_t most = 0;
  for (int index = 0;; ++index) {
    std::ifstream file(fmt::format("/sys/devices/system/cpu/cpu0/cache/index{}/size", index));
    int64_t kib = 0;
    if (!(file >> kib)) return most;
    most = std::max(most, kib * 1024);
  }
}

double read_gbytes_per_s(int32_t threads) {
  constexpr int64_t kBytes = 512 << 20;
  const GuardedTensor buffer(kBytes);
  std::memset(buffer.data(), 1, kBytes);
  double best = 0;
  for (int round = 0; round < 5; ++round) {
    const auto begin = std::chrono::steady_clock::now();
    parallel(default_executor(), threads, [&](int32_t i) {
      const int64_t floats = kBytes / 4 / threads;
      sink = HWY_DYNAMIC_DISPATCH(sum_floats)(
          reinterpret_cast<const float*>(buffer.data()) + i * (floats / 64 * 64), floats / 64 * 64);
    });
    best = std::max(best, static_cast<double>(kBytes) / seconds_since(begin) * 1e-9);
  }
  return best;
}

}  // namespace wh::cli
#endif
