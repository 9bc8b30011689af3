// What a worker does between two looks at the caller's progress callback. The CPU kernels count
// work in multiply-adds, so that the fraction done follows the time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "core/key_range.h"
#include "core/progress.h"
#include "core/rounding.h"
#include "cpu/common/cost.h"
#include "cpu/common/partial.h"
#include "cpu/cpu_facts.h"
#include "plan/kernel.h"
#include "plan/work.h"

namespace wh::cpu {

// 20 microseconds or so, under which a counter that 64 cores share would show.
constexpr int64_t kWorthALook = 1 << 20;
constexpr int64_t kRowsPerMerge = 16;  // that a worker merges in one go

// Rows against a tile of keys, rows that are stored, and rows that are merged (0 where there is one
// chunk and nothing to merge).
inline int64_t tile_work(const Problem& p, int64_t rows, KeyRange keys) {
  return rows * keys.size() * (p.dim_qk + p.dim_v);
}
inline int64_t store_work(const Problem& p, int64_t rows) { return rows * p.dim_v; }
inline int64_t merge_work(const Partials& partials, int64_t rows) {
  return partials.chunks > 1 ? rows * partials.chunks * partials.dim_v : 0;
}

// Pieces of so much work that a worker takes between two looks.
inline int64_t pieces_between_looks(int64_t piece_work) {
  return divide_up(kWorthALook, std::max<int64_t>(1, piece_work));
}

// A step of so many cycles that reads so many keys of one head, while every thread does the
// same: they share the memory, and cores where there are more threads.
inline double step_us_of(const Query& query, const Config& config, double cycles, double keys) {
  const Problem& p = query.problem;
  const double threads = config.workers, cores = cpu_facts(query).cores;
  const double all_keys =
      std::max(1.0, static_cast<double>(p.batch * p.heads_kv) * static_cast<double>(p.len_k));
  const double read =
      read_us(cpu_facts(query), kv_bytes(p)) * keys / all_keys * std::min(threads, cores);
  return (cycles * cycle_us(cpu_facts(query)) + read) * std::max(1.0, threads / cores);
}

// One worker's side of the progress.
class Steps {
 public:
  explicit Steps(Progress& progress) : progress_(progress) {}
  ~Steps() { progress_.add(since_look_); }
  Steps(const Steps&) = delete;
  Steps& operator=(const Steps&) = delete;

  // After each piece. Looks when there is enough since the last time; false: stop.
  bool done(int64_t work) {
    since_look_ += work;
    return since_look_ < kWorthALook ? !progress_.is_cancelled() : look();
  }
  // Before what cannot be taken back, however little was done; false: stop.
  bool look() { return progress_.step_done(std::exchange(since_look_, 0)); }

  void writing_out() { progress_.writing_out(); }

 private:
  Progress& progress_;
  int64_t since_look_ = 0;
};

}  // namespace wh::cpu
