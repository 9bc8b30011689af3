#include "core/executor.h"

#include <hwy/cache_control.h>
#include <tbb/parallel_for.h>
#include <tbb/task_group.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <new>
#include <thread>

namespace wh {
namespace {

using Clock = std::chrono::steady_clock;

// Waking a sleeping worker takes longer than half of a decode step of 50 microseconds. After a
// short call the workers therefore stay awake a while; after a long one they may sleep, as waking
// them does not show in the next.
constexpr std::chrono::microseconds kStayAwake{200};
constexpr std::chrono::milliseconds kShortCall{2};

std::atomic<uint64_t> calls{0};

// Gives `workers` idle threads of the arena something to spin on until the next call.
void keep_awake(int32_t workers) try {
  static auto* const tasks = new tbb::task_group;  // never waited for, so never destroyed
  const uint64_t call = calls.load(std::memory_order_relaxed);
  const auto caller = std::this_thread::get_id();
  const auto until = Clock::now() + kStayAwake;
  for (int32_t i = 0; i < workers; ++i) {
    tasks->run([=] {
      // The caller meets its own leftovers when it next waits for something.
      if (std::this_thread::get_id() == caller) return;
      while (calls.load(std::memory_order_relaxed) == call && Clock::now() < until) hwy::Pause();
    });
  }
} catch (const std::bad_alloc&) {  // the call itself has succeeded
}

void run_on_tbb(void*, int32_t count, Executor::Task task, void* argument) {
  calls.fetch_add(1, std::memory_order_relaxed);
  const auto begin = Clock::now();
  tbb::parallel_for(
      int32_t{0}, count, [&](int32_t i) { task(argument, i); }, tbb::simple_partitioner());
  const int32_t others = std::min(count, tbb::this_task_arena::max_concurrency()) - 1;
  if (Clock::now() - begin < kShortCall) keep_awake(others);
}

}  // namespace

const Executor& default_executor() {
  static const Executor executor{run_on_tbb, nullptr};
  return executor;
}

}  // namespace wh
