// What a call allocates, and what it does when an allocation fails. A program of its own: it
// replaces the global allocation functions.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "widehead/widehead.h"

namespace {

std::atomic<int64_t> allocations{0};  // calls since reset()
std::atomic<int64_t> live_bytes{0};
std::atomic<int64_t> largest_bytes{0};  // single allocation since reset()
std::atomic<int64_t> fail_at{-1};       // this allocation alone fails; -1: none

void* allocate(size_t bytes, size_t alignment) {
  const int64_t index = allocations++;
  if (index == fail_at) return nullptr;
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

bool is_bf16_kernel(const std::string& kernel) { return kernel == "cpu_prefill_bf16"; }

struct Call {
  wh_problem problem;
  wh_limits limits;
  wh_tensors tensors;
  std::vector<float> q, k, v, out;

  Call(int64_t len_q, int64_t len_k, const std::string& kernel = "") {
    wh_problem_init(&problem, sizeof(problem));
    wh_limits_init(&limits, sizeof(limits));
    wh_tensors_init(&tensors, sizeof(tensors));
    problem.heads_q = 4;
    problem.heads_kv = 2;
    problem.len_q = len_q;
    problem.len_k = len_k;
    problem.dim_qk = problem.dim_v = 64;
    if (is_bf16_kernel(kernel)) problem.dtype_q = problem.dtype_kv = WH_BF16;  // in half the room
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

class Memory : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const std::string cpu = wh_device_json(WH_CPU, 0);
    if (is_bf16_kernel(GetParam()) && cpu.find("\"avx512_bf16\":true") == std::string::npos) {
      GTEST_SKIP() << "this CPU has no AVX512-BF16";
    }
  }
};

TEST_P(Memory, TheOneCallAllocatesThePlansBytesAndNothingElseOfSize) {
  for (int32_t threads : {1, 2}) {
    SCOPED_TRACE(threads);
    Call call(16, 6000, GetParam());
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
  Call call(16, 6000, GetParam());
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

// The last worker, which is asked first, takes all items, so that the last byte belongs to what it
// uses. Painted twice, as a byte may have the value of one paint.
TEST_P(Memory, EveryPlannedByteUpToTheLastIsUsedAndNoneBehindIt) {
  const wh_executor last_first{
      [](void*, int32_t count, void (*task)(void*, int32_t), void* argument) {
        for (int32_t i = count - 1; i >= 0; --i) task(argument, i);
      },
      nullptr};
  wh_run_options options;
  ASSERT_EQ(wh_run_options_init(&options, sizeof(options)), WH_OK);
  options.executor = &last_first;
  constexpr size_t kGuardBytes = 64;
  struct Shape {
    int64_t heads_q, heads_kv, len_q, len_k, dim_qk, dim_v;
  };
  constexpr Shape kShapes[] = {{16, 2, 1, 4096, 256, 256}, {4, 2, 16, 6000, 64, 64},
                               {3, 1, 2, 700, 40, 24},     {1, 1, 1, 1, 1, 1},
                               {5, 5, 1, 3000, 100, 7},    {2, 1, 50, 33, 13, 130},
                               {7, 1, 3, 9000, 72, 72},    {1, 1, 128, 2500, 24, 40}};
  for (const Shape& shape : kShapes) {
    for (const int32_t threads : {1, 2, 5, 64}) {
      for (const int32_t mask : {WH_MASK_NONE, WH_MASK_BOOLEAN}) {
        SCOPED_TRACE(testing::Message()
                     << shape.heads_q << "/" << shape.heads_kv << " heads, " << shape.len_q << " x "
                     << shape.len_k << ", " << threads << " threads, mask " << mask);
        Call call(1, 1, GetParam());
        wh_problem& p = call.problem;
        p.heads_q = shape.heads_q;
        p.heads_kv = shape.heads_kv;
        p.len_q = shape.len_q;
        p.len_k = shape.len_k;
        p.dim_qk = shape.dim_qk;
        p.dim_v = shape.dim_v;
        p.mask = mask;
        ASSERT_EQ(wh_problem_set_dense(&p), WH_OK);
        const std::vector<float> q(static_cast<size_t>(p.heads_q * p.len_q * p.dim_qk), 0.5f);
        const std::vector<float> k(static_cast<size_t>(p.heads_kv * p.len_k * p.dim_qk), 0.5f);
        const std::vector<float> v(static_cast<size_t>(p.heads_kv * p.len_k * p.dim_v), 0.5f);
        std::vector<float> out(static_cast<size_t>(p.heads_q * p.len_q * p.dim_v));
        const std::vector<uint8_t> attend(static_cast<size_t>(p.heads_q * p.len_q * p.len_k), 1);
        call.limits.kernel = GetParam();
        call.limits.threads = threads;
        wh_plan* plan = nullptr;
        ASSERT_EQ(wh_plan_create(&p, &call.limits, &plan), WH_OK) << wh_last_error();
        const size_t bytes = wh_plan_workspace_bytes(plan);
        ASSERT_GT(bytes, 0u);
        auto* workspace = static_cast<unsigned char*>(
            std::aligned_alloc(64, (bytes + kGuardBytes + 63) / 64 * 64));
        call.tensors.q = q.data();
        call.tensors.k = k.data();
        call.tensors.v = v.data();
        call.tensors.out = out.data();
        call.tensors.mask = mask == WH_MASK_NONE ? nullptr : attend.data();
        call.tensors.workspace = workspace;
        call.tensors.workspace_bytes = bytes;
        bool is_last_used = false;
        for (const int paint : {0x5a, 0xa5}) {
          std::memset(workspace, paint, bytes + kGuardBytes);
          EXPECT_EQ(wh_plan_run(plan, &call.tensors, &options), WH_OK) << wh_last_error();
          is_last_used = is_last_used || workspace[bytes - 1] != paint;
          for (size_t i = bytes; i < bytes + kGuardBytes; ++i) ASSERT_EQ(workspace[i], paint) << i;
        }
        EXPECT_TRUE(is_last_used) << bytes << " bytes are planned";
        std::free(workspace);
        wh_plan_destroy(plan);
      }
    }
  }
}

// On two threads, where pieces of 64 bytes had the last 32 of them to spare.
TEST(Workspace, ALongDecodeInF32TakesWhatItUses) {
  Call call(1, 1);
  wh_problem& p = call.problem;
  p.heads_q = 16;
  p.len_k = 32768;
  p.dim_qk = p.dim_v = 256;
  ASSERT_EQ(wh_problem_set_dense(&p), WH_OK);
  call.limits.kernel = "cpu_decode";
  call.limits.threads = 2;
  wh_plan* plan = nullptr;
  ASSERT_EQ(wh_plan_create(&p, &call.limits, &plan), WH_OK) << wh_last_error();
  EXPECT_EQ(wh_plan_workspace_bytes(plan) % 64, 32u);  // 8 rows' last keys come last
  wh_plan_destroy(plan);
}

// While one lives, the n-th allocation from here on fails.
class OneFailure {
 public:
  explicit OneFailure(int64_t n) {
    allocations = 0;
    fail_at = n;
  }
  ~OneFailure() { fail_at = -1; }
  OneFailure(const OneFailure&) = delete;
  OneFailure& operator=(const OneFailure&) = delete;
};

// The last message belongs to the library: the same one before and after leaves its bytes out.
int64_t live_bytes_beside_the_message() {
  Call call(1, 1);
  call.problem.heads_q = 3;
  EXPECT_EQ(wh_attention(&call.problem, nullptr, &call.tensors, nullptr), WH_INVALID_ARGUMENT);
  const int64_t own = static_cast<int64_t>(
      (call.q.capacity() + call.k.capacity() + call.v.capacity() + call.out.capacity()) *
      sizeof(float));
  return live_bytes - own;
}

// Calls body(n) with n from 0 on, which makes one call of the library with allocation n failing
// alone, until there is no allocation n. Then it must answer `at_last`.
template <typename Body>
void fail_each_allocation(wh_status at_last, Body body) {
  for (int64_t n = 0;; ++n) {
    ASSERT_LT(n, 3000) << "never succeeded";
    const int64_t before = live_bytes_beside_the_message();
    const wh_status status = body(n);
    if (allocations <= n) {
      EXPECT_EQ(status, at_last) << wh_last_error();
      EXPECT_GT(n, 0) << "nothing was allocated: the test tests nothing";
      return;
    }
    ASSERT_EQ(status, WH_OUT_OF_MEMORY) << "allocation " << n << ": " << wh_last_error();
    ASSERT_NE(std::string(wh_last_error()).find("memory"), std::string::npos) << wh_last_error();
    ASSERT_EQ(live_bytes_beside_the_message(), before) << "allocation " << n << " leaked";
  }
}

wh_status create(const Call& call, int64_t n, wh_plan** plan) {
  const OneFailure failure(n);
  return wh_plan_create(&call.problem, &call.limits, plan);
}

TEST(OutOfMemory, EveryFailedAllocationOfPlanningIsAnError) {
  Call call(16, 300);
  wh_attention(&call.problem, nullptr, &call.tensors, nullptr);  // facts and environment are read
  for (const uint64_t budget : {uint64_t{WH_NO_BYTE_LIMIT}, uint64_t{10}}) {
    call.limits.workspace_bytes = budget;
    fail_each_allocation(budget == 10 ? WH_REFUSED : WH_OK, [&](int64_t n) {
      wh_plan* plan = nullptr;
      const wh_status status = create(call, n, &plan);
      EXPECT_EQ(plan == nullptr, status == WH_OUT_OF_MEMORY);
      const int64_t count = allocations;
      wh_plan_destroy(plan);
      allocations = count;
      return status;
    });
  }
}

// A text that a plan makes on demand.
void fail_each_allocation_of(const char* (*text_of)(const wh_plan*)) {
  Call call(16, 300);
  wh_attention(&call.problem, nullptr, &call.tensors, nullptr);  // facts and environment are read
  fail_each_allocation(WH_OK, [&](int64_t n) {
    wh_plan* plan = nullptr;
    EXPECT_EQ(wh_plan_create(&call.problem, &call.limits, &plan), WH_OK);
    const char* text = nullptr;
    {
      const OneFailure failure(n);
      text = text_of(plan);
    }
    const int64_t count = allocations;
    const char* later = text_of(plan);
    wh_plan_destroy(plan);
    allocations = count;
    EXPECT_NE(later, nullptr);
    return text == nullptr ? WH_OUT_OF_MEMORY : WH_OK;
  });
}

TEST(OutOfMemory, EveryFailedAllocationOfExplainIsAnError) {
  fail_each_allocation_of(wh_plan_explain);
}
TEST(OutOfMemory, EveryFailedAllocationOfJsonIsAnError) { fail_each_allocation_of(wh_plan_json); }

TEST(OutOfMemory, EveryFailedAllocationOfFromJsonIsAnError) {
  Call call(16, 300);
  wh_plan* plan = nullptr;
  ASSERT_EQ(wh_plan_create(&call.problem, &call.limits, &plan), WH_OK);
  const std::string json = wh_plan_json(plan);
  wh_plan_destroy(plan);
  fail_each_allocation(WH_OK, [&](int64_t n) {
    wh_plan* again = nullptr;
    wh_status status;
    {
      const OneFailure failure(n);
      status = wh_plan_from_json(json.data(), json.size(), &again);
    }
    EXPECT_EQ(again == nullptr, status != WH_OK);
    const int64_t count = allocations;
    wh_plan_destroy(again);
    allocations = count;
    return status;
  });
}

TEST_P(Memory, EveryFailedAllocationOfTheOneCallIsAnErrorAndTheWorkspacesNamesItsBytes) {
  Call call(16, 301, GetParam());  // not in the cache yet
  call.limits.kernel = GetParam();
  call.limits.threads = 1;  // the pool's threads have allocations of their own
  wh_plan* plan = nullptr;
  ASSERT_EQ(wh_plan_create(&call.problem, &call.limits, &plan), WH_OK) << wh_last_error();
  const std::string expected =
      "no memory for " + std::to_string(wh_plan_workspace_bytes(plan)) + " bytes of workspace";
  wh_plan_destroy(plan);
  // A full cache: a new entry frees an old one, here of the same bytes.
  for (int64_t i = 0; i < 70; ++i) {
    Call other(16, 400 + i, GetParam());
    other.limits = call.limits;
    ASSERT_EQ(wh_attention(&other.problem, &other.limits, &other.tensors, nullptr), WH_OK);
  }
  int named = 0;
  fail_each_allocation(WH_OK, [&](int64_t n) {
    const OneFailure failure(n);
    const wh_status status = wh_attention(&call.problem, &call.limits, &call.tensors, nullptr);
    named += status == WH_OUT_OF_MEMORY && wh_last_error() == expected;
    return status;
  });
  EXPECT_EQ(named, 1);
}

INSTANTIATE_TEST_SUITE_P(Cpu, Memory,
                         testing::Values("cpu_prefill", "cpu_prefill_bf16", "cpu_decode",
                                         "cpu_unfused", "cpu_reference"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
