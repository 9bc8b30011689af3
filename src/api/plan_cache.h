// Plans by shape and limits, for the one call that plans by itself.
#pragma once

#include <list>
#include <memory>
#include <mutex>

#include "plan/plan.h"

namespace wh {

class PlanCache {
 public:
  // The cached plan of these, or null.
  std::shared_ptr<const Plan> find(const Problem& problem, const Limits& limits);
  void insert(std::shared_ptr<const Plan> plan);

 private:
  // A model asks for few shapes; decode asks for a new length each token, so old ones must leave.
  static constexpr size_t kCapacity = 64;

  std::mutex mutex_;
  std::list<std::shared_ptr<const Plan>> plans_;  // the most recently used first
};

}  // namespace wh
