// What a call allocates, and what it does when an allocation fails. A program of its own: it
// replaces the global allocation functions.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#include "widehead/widehead.h"

namespace {

std::atomic<int64_t> allocations{0};  // calls since reset()
std::atomic<int64_t> live_bytes{0};
std::atomic<int64_t> largest_bytes{0};  // single allocation since reset()
std::atomic<int64_t> fail_at{-1};       // this allocation and all after it fail; -1: none

void* allocate(size_t bytes, size_t alignment) {
  const int64_t index = allocations++;
  const int64_t limit = fail_at;
  if (limit >= 0 && index >= limit) return nullptr;
  // The size sits before the piece, so that release() can count it.
  const size_t offset = std::max<size_t>(alignment, 64);
  void* base = std::aligned_alloc(offset, (bytes + 2 * offset - 1) / offset * offset);
  if (base == nullptr) return nullptr;
  *static_cast<size_t*>(base) = bytes;
  live_bytes += static_cast<int64_t>(bytes);
  largest_bytes = std::max(largest_bytes.load(), static_cast<int64_t>(bytes));
  return static_cast<char*>(base) + offset;
}

void release(void* data, size_t alignment) {
  if (data == nullptr) return;
  void* base = static_cast<char*>(data) - std::max<size_t>(alignment, 64);
  live_bytes -= static_cast<int64_t>(*static_cast<size_t*>(base));
  std::free(base);
}

void* allocate_or_throw(size_t bytes, size_t alignment) {
  if (void* data = allocate(bytes, alignment)) return data;
  throw std::bad_alloc();
}

void reset() {
  allocations = 0;
  largest_bytes = 0;
}

}  // namespace

void* operator new(size_t bytes) { return allocate_or_throw(bytes, 64); }
void* operator new[](size_t bytes) { return allocate_or_throw(bytes, 64); }
void* operator new(size_t bytes, std::align_val_t alignment) {
  return allocate_or_throw(bytes, static_cast<size_t>(alignment));
}
void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return allocate(bytes, 64); }
void* operator new(size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return allocate(bytes, static_cast<size_t>(alignment));
}
void operator delete(void* data) noexcept { release(data, 64); }
void operator delete[](void* data) noexcept { release(data, 64); }
void operator delete(void* data, size_t) noexcept { release(data, 64); }
void operator delete[](void* data, size_t) noexcept { release(data, 64); }
void operator delete(void* data, std::align_val_t alignment) noexcept {
  release(data, static_cast<size_t>(alignment));
}

namespace {

struct Call {
  wh_problem problem;
  wh_limits limits;
  wh_tensors tensors;
  std::vector<float> q, k, v, out;

  Call(int64_t len_q, int64_t len_k) {
    wh_problem_init(&problem, sizeof(problem));
    wh_limits_init(&limits, sizeof(limits));
    wh_tensors_init(&tensors, sizeof(tensors));
    problem.heads_q = 4;
    problem.heads_kv = 2;
    problem.len_q = len_q;
    problem.len_k = len_k;
    problem.dim_qk = problem.dim_v = 64;
    wh_problem_set_dense(&problem);
    q.resize(static_cast<size_t>(4 * len_q * 64), 1.0f);
    out.resize(q.size());
    k.resize(static_cast<size_t>(2 * len_k * 64), 1.0f);
    v.resize(k.size(), 1.0f);
    tensors.q = q.data();
    tensors.k = k.data();
    tensors.v = v.data();
    tensors.out = out.data();
  }
};

class Memory : public testing::TestWithParam<const char*> {};

TEST_P(Memory, TheOneCallAllocatesThePlansBytesAndNothingElseOfSize) {
  for (int32_t threads : {1, 2}) {
    SCOPED_TRACE(threads);
    Call call(16, 6000);
    call.limits.kernel = GetParam();
    call.limits.threads = threads;
    wh_plan* plan = nullptr;
    ASSERT_EQ(wh_plan_create(&call.problem, &call.limits, &plan), WH_OK) << wh_last_error();
    const auto planned = static_cast<int64_t>(wh_plan_workspace_bytes(plan));
    wh_plan_destroy(plan);
    ASSERT_EQ(wh_attention(&call.problem, &call.limits, &call.tensors, nullptr), WH_OK);  // caches
    const int64_t before = live_bytes;
    reset();
    ASSERT_EQ(wh_attention(&call.problem, &call.limits, &call.tensors, nullptr), WH_OK);
    EXPECT_EQ(largest_bytes, planned);
    if (threads > 1) continue;  // threads of the pool allocate their own small pieces
    EXPECT_LE(allocations, 4);  // the workspace, and the limits' kernel name here and there
    EXPECT_EQ(live_bytes, before);
  }
}

TEST_P(Memory, APlannedRunAllocatesNothing) {
  Call call(16, 6000);
  call.limits.kernel = GetParam();
  call.limits.threads = 1;  // threads of the pool allocate for themselves
  wh_plan* plan = nullptr;
  ASSERT_EQ(wh_plan_create(&call.problem, &call.limits, &plan), WH_OK);
  const size_t bytes = wh_plan_workspace_bytes(plan);
  void* workspace = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  call.tensors.workspace = workspace;
  call.tensors.workspace_bytes = bytes;
  ASSERT_EQ(wh_plan_run(plan, &call.tensors, nullptr), WH_OK) << wh_last_error();
  reset();
  ASSERT_EQ(wh_plan_run(plan, &call.tensors, nullptr), WH_OK);
  EXPECT_EQ(allocations, 0);
  std::free(workspace);
  wh_plan_destroy(plan);
}

INSTANTIATE_TEST_SUITE_P(Cpu, Memory,
                         testing::Values("cpu_prefill", "cpu_decode", "cpu_unfused",
                                         "cpu_reference"),
                         [](const auto& info) { return std::string(info.param); });

// Fails each allocation of `body` in turn until it succeeds with none failing.
template <typename Body>
void fail_each_allocation(Body body) {
  for (int64_t n = 0;; ++n) {
    ASSERT_LT(n, 1000) << "never succeeded";
    const int64_t before = live_bytes;
    allocations = 0;
    fail_at = n;
    const wh_status status = body();
    fail_at = -1;
    if (status == WH_OK) {
      EXPECT_GT(n, 0) << "nothing was allocated: the test tests nothing";
      return;
    }
    ASSERT_EQ(status, WH_OUT_OF_MEMORY) << "allocation " << n << ": " << wh_last_error();
    ASSERT_NE(std::string(wh_last_error()), "");
    ASSERT_LE(live_bytes, before + 4096) << "allocation " << n << " leaked";
  }
}

TEST(OutOfMemory, EveryFailedAllocationIsAnError) {
  Call call(16, 300);
  wh_attention(&call.problem, nullptr, &call.tensors, nullptr);  // facts and environment are read
  fail_each_allocation([&] {
    wh_plan* plan = nullptr;
    const wh_status status = wh_plan_create(&call.problem, &call.limits, &plan);
    EXPECT_EQ(plan == nullptr, status != WH_OK);
    wh_plan_destroy(plan);
    return status;
  });
  call.limits.kernel = "cpu_prefill";  // not in the cache yet
  fail_each_allocation(
      [&] { return wh_attention(&call.problem, &call.limits, &call.tensors, nullptr); });
}

TEST(OutOfMemory, AWorkspaceThatCannotBeHadNamesItsBytes) {
  Call call(16, 300);
  ASSERT_EQ(wh_attention(&call.problem, nullptr, &call.tensors, nullptr), WH_OK);
  allocations = 0;
  fail_at = 0;
  const wh_status status = wh_attention(&call.problem, nullptr, &call.tensors, nullptr);
  fail_at = -1;
  EXPECT_EQ(status, WH_OUT_OF_MEMORY);
}

}  // namespace
