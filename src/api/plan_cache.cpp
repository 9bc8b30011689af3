#include "api/plan_cache.h"

namespace wh {

std::shared_ptr<const Plan> PlanCache::find(const Problem& problem, const Limits& limits) {
  const std::lock_guard lock(mutex_);
  for (auto it = plans_.begin(); it != plans_.end(); ++it) {
    if ((*it)->problem == problem && (*it)->limits == limits) {
      plans_.splice(plans_.begin(), plans_, it);
      return plans_.front();
    }
  }
  return nullptr;
}

void PlanCache::insert(std::shared_ptr<const Plan> plan) {
  const std::lock_guard lock(mutex_);
  plans_.push_front(std::move(plan));
  if (plans_.size() > kCapacity) plans_.pop_back();
}

}  // namespace wh
