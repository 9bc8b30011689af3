#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>

namespace widehead_python {
namespace {

// The entry that GCC compiles `#pragma omp parallel` to; the OpenMP libraries of LLVM and Intel
// have it too. Asked for 0 threads it takes as many as PyTorch last set, and keeps them for its
// next region: another number would end some and start them again.
using Parallel = void (*)(void (*region)(void*), void* argument, unsigned threads, unsigned flags);

std::atomic<Parallel> parallel_region{nullptr};

// A forked process has none of its parent's threads, whoever had started them: OpenMP would wait
// for them, ours do without. From the module's import on, as PyTorch may be met behind the fork.
std::atomic<bool> is_forked{false};
const bool notices_forks = pthread_atfork(nullptr, nullptr, [] { is_forked = true; }) == 0;

struct Tasks {
  std::atomic<int32_t> next{0};
  int32_t count;
  void (*task)(void* argument, int32_t i);
  void* argument;

  static void take(void* tasks) {
    auto& self = *static_cast<Tasks*>(tasks);
    for (int32_t i; (i = self.next.fetch_add(1, std::memory_order_relaxed)) < self.count;) {
      self.task(self.argument, i);
    }
  }
};

void run_on_openmp(void*, int32_t count, void (*task)(void*, int32_t), void* argument) {
  Tasks tasks{.count = count, .task = task, .argument = argument};
  parallel_region.load(std::memory_order_acquire)(Tasks::take, &tasks, 0, 0);
}

}  // namespace

bool use_torch_threads() {
  if (is_forked || !notices_forks) return false;
  // Other packages bring OpenMP libraries of their own: the one that PyTorch is linked with.
  void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) return false;
  const auto found = reinterpret_cast<Parallel>(dlsym(torch, "GOMP_parallel"));
  dlclose(torch);
  if (found == nullptr) return false;
  parallel_region.store(found, std::memory_order_release);
  return true;
}

const wh_executor* executor() {
  static constexpr wh_executor kOpenMp{run_on_openmp, nullptr};
  return is_forked || parallel_region.load(std::memory_order_relaxed) == nullptr ? nullptr
                                                                                 : &kOpenMp;
}

}  // namespace widehead_python
