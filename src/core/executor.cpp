#include "core/executor.h"

#include <tbb/parallel_for.h>

namespace wh {

const Executor& default_executor() {
  static const Executor executor{[](void*, int32_t count, Executor::Task task, void* argument) {
                                   tbb::parallel_for(
                                       int32_t{0}, count, [&](int32_t i) { task(argument, i); },
                                       tbb::simple_partitioner());
                                 },
                                 nullptr};
  return executor;
}

}  // namespace wh
