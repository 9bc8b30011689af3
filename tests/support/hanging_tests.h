// A test that hangs says which it is, within seconds, where a time-out of the whole would not.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <thread>

namespace wh {

class HangingTests final : public testing::EmptyTestEventListener {
 public:
  explicit HangingTests(std::chrono::seconds limit)
      : limit_(limit), watcher_([this] { watch(); }) {}
  ~HangingTests() override {
    {
      const std::lock_guard lock(mutex_);
      is_over_ = true;
    }
    changed_.notify_one();
    watcher_.join();
  }

 private:
  using Clock = std::chrono::steady_clock;

  void OnTestStart(const testing::TestInfo& test) override {
    set(std::string(test.test_suite_name()) + "." + test.name(), Clock::now() + limit_);
  }
  void OnTestEnd(const testing::TestInfo&) override { set("", Clock::time_point::max()); }

  void set(std::string name, Clock::time_point end) {
    {
      const std::lock_guard lock(mutex_);
      name_ = std::move(name);
      end_ = end;
    }
    changed_.notify_one();
  }
  void watch() {
    std::unique_lock lock(mutex_);
    while (!is_over_) {
      if (name_.empty()) {
        changed_.wait(lock);
      } else if (Clock::now() < end_) {
        changed_.wait_until(lock, end_);
      } else {
        std::fprintf(stderr, "%s has hung for %lld s\n", name_.c_str(),
                     static_cast<long long>(limit_.count()));
        std::abort();
      }
    }
  }

  const std::chrono::seconds limit_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::string name_;  // of the test under way
  Clock::time_point end_ = Clock::time_point::max();
  bool is_over_ = false;
  std::thread watcher_;  // last: it reads the others
};

// From the program's start on: ends it when a test takes longer.
inline bool end_hanging_tests(std::chrono::seconds limit) {
  testing::UnitTest::GetInstance()->listeners().Append(new HangingTests(limit));
  return true;
}

}  // namespace wh
