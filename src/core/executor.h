// How the library gets threads. A host program can hand in its own; the default is oneTBB.
#pragma once

#include <cstdint>
#include <type_traits>

namespace wh {

struct Executor {
  // Calls task(argument, i) once for every i in [0, count), on any threads, and returns when all
  // are done. Kernels hand out their items themselves from an atomic counter, so a serial loop is
  // a valid executor and an uneven one costs nothing.
  using Task = void (*)(void* argument, int32_t i);
  void (*parallel)(void* context, int32_t count, Task task, void* argument) = nullptr;
  void* context = nullptr;
};

const Executor& default_executor();

// Runs body(i) for i in [0, count) on the executor.
template <typename Body>
void parallel(const Executor& executor, int32_t count, Body&& body) {
  if (count <= 1) {
    if (count == 1) body(0);
    return;
  }
  executor.parallel(
      executor.context, count,
      [](void* argument, int32_t i) {
        (*static_cast<std::remove_reference_t<Body>*>(argument))(i);
      },
      &body);
}

}  // namespace wh
